"""The options of `quantkit verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError


def add(parser: argparse.ArgumentParser) -> None:
    """Add what to verify, and how much of it."""
    parser.add_argument("what", metavar="REPO_OR_FOLDER", help="owner/name on the Hub, or a folder")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--file",
        action="append",
        metavar="NAME",
        help="of several sizes only this GGUF (repeatable); the others are not downloaded",
    )
    parser.add_argument("--base", type=Path, metavar="BASE.gguf", help="the full-precision file")
    much = parser.add_mutually_exclusive_group()
    much.add_argument(
        "--sample", type=int, default=8, metavar="N", help="measure N random windows again (8)"
    )
    much.add_argument("--full", action="store_true", help="measure everything again")
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same sample once more")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a text that could not be published",
    )
    parser.add_argument("--tasks", type=Path, metavar="FILE", help="items that were not published")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep the full-precision file here for next time"
    )


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked, by the names of `verifying.verify.Asked`. Raises UsageError."""
    texts = {}
    for given in arguments.text:
        name, equals, path = given.partition("=")
        if not equals or not Path(path).is_file():
            raise UsageError(f"{given} is no NAME=FILE of a text.", "Write --text docs=docs.txt.")
        texts[name] = Path(path)
    for option, path in (("--base", arguments.base), ("--tasks", arguments.tasks)):
        if path is not None and not path.is_file():
            raise UsageError(f"There is no file {path}.", f"Check the path after {option}.")
    if arguments.sample < 1:
        raise UsageError(f"{arguments.sample} windows are none.", "Use --sample 1 or more.")
    return {
        "what": arguments.what,
        "revision": arguments.revision,
        "only": arguments.file and tuple(arguments.file),
        "n_windows": None if arguments.full else arguments.sample,
        "seed": arguments.seed,
        "base": arguments.base,
        "texts": texts,
        "items": arguments.tasks,
        "device": arguments.device,
        "work": arguments.work,
    }
