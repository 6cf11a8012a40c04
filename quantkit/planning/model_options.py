"""The options of `quantkit run` and `quantkit plan`: what to make, from what, and how."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from quantkit.config import DEMO_MODEL, PREFERENCES, PROFILES, RunConfig
from quantkit.config.devices import DEVICES
from quantkit.config.targets import FAMILY
from quantkit.tensors import METHODS


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help=f"a Hub id, a Hub URL, a local folder, or {DEMO_MODEL}"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--target-bpw", metavar="X,...", help="bits per weight of the whole file, such as 4.5"
    )
    size.add_argument(
        "--target-size", metavar="S,...", help="bytes of the whole file, such as 90MB or 5.5GB"
    )
    size.add_argument(
        "--like",
        metavar="TYPE,...",
        help="at most llama.cpp's size for this type (default: Q4_K_M)",
    )
    size.add_argument(
        "--fits",
        metavar="MEM@CTX,...",
        help="the largest file that fits with a context of CTX tokens (8192) in MEM: a size, or one"
        f" of {', '.join(DEVICES)}",
    )
    size.add_argument(
        "--family",
        action="store_const",
        const=",".join(FAMILY),
        help=f"one file for each of {', '.join(FAMILY)}, all made in one run",
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default="standard", help="amount of work (default: standard)"
    )
    parser.add_argument(
        "--types",
        type=Path,
        metavar="MAP.json",
        help="fix the types of matching tensors; `>=Q5_K` sets a minimum",
    )
    parser.add_argument(
        "--max-types", type=int, metavar="N", help="use at most N different types in the file"
    )
    parser.add_argument(
        "--tuning",
        type=int,
        metavar="STEPS",
        help="gradient steps to fine-tune each block; 0 turns tuning off (default: the profile's)",
    )
    parser.add_argument(
        "--levels", metavar="LIST", help="types to choose from, such as Q3_K,Q4_K,Q6_K"
    )
    parser.add_argument(
        "--prefer",
        choices=PREFERENCES,
        default="quality",
        help="speed: no type that is slow on CPUs",
    )
    parser.add_argument(
        "--levels-from",
        action="append",
        default=[],
        metavar="GGUF",
        help="let tensors of this GGUF of the same model compete: a path or hf://...",
    )
    parser.add_argument(
        "--methods",
        metavar="LIST",
        default=",".join(METHODS),
        help="methods that compete for each tensor (default: %(default)s)",
    )
    parser.add_argument(
        "--tensors", metavar="REGEX", help="quantize only tensors whose name matches"
    )
    parser.add_argument(
        "--equalize",
        action="store_true",
        help="move powers of two between channels and the layers that read them, so that rounding"
        " costs less",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the model")
    parser.add_argument(
        "--calibration",
        metavar="SPEC",
        default="auto",
        help="calibration text: name[:weight],... (default: auto)",
    )
    parser.add_argument(
        "--eval-text", metavar="FILE", help="validate on this text instead of the held-out tenth"
    )
    parser.add_argument(
        "--tasks", metavar="FILE", help="validate on these multiple-choice items, too (JSON lines)"
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="GGUF",
        help="also measure this GGUF of the same model: a path or hf://owner/name/file.gguf",
    )
    parser.add_argument(
        "--split-at",
        metavar="SIZE",
        help="publish a larger file in parts, as llama.cpp loads them (default: 50GB)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda uses all visible GPUs"
    )


def folder_name(config: RunConfig) -> str:
    """Return the name of the folder of a run that was given none: the model and what was asked."""
    words = [config.model.rstrip("/").rsplit("/", 1)[-1], *(t.value for t in config.targets)]
    name = re.sub(r"[^A-Za-z0-9._@-]+", "-", "-".join(words)).strip("-.")
    return name[:100] or "model"
