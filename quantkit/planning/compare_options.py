"""The options of `quantkit compare`: most are the evaluators' own, passed on unchanged."""

from __future__ import annotations

import argparse
from pathlib import Path

# Flag, metavar, help.
_OPTIONS = (
    ("--text", "[NAME=]FILE", "UTF-8 text to measure on; several are reported as domains"),
    ("--dataset", "NAME", "a text from the Hub, also a domain: wikitext2, c4 or fineweb-edu"),
    ("--ctx", "N", "tokens of a window (default: 512)"),
    ("--chunks", "N", "windows of each text (default: all)"),
    ("--task", "NAME", "zero-shot task such as piqa; can be repeated"),
    ("--data", "FILE", "use local items for that task instead of the Hub's"),
    ("--limit", "N", "use only the first N items of each task"),
    ("--documents", "N", "with --conversations: use only N of each domain"),
    ("--prompts", "N", "with --answers: use only the first N prompts"),
    ("--tokens", "N", "with --answers: tokens of an answer at most (default: 128)"),
    ("--cache", "DIR", "keep the base's logits here for the next comparison"),
    ("--threads", "N", "CPU threads (default: all cores)"),
    ("--device", "NAME", "cpu or cuda (default: cpu); cuda uses all GPUs"),
    ("--gpu-layers", "N", "with --device cuda: layers on the GPU (default: all)"),
)
_FLAGS = (
    ("--weight-kl", "also measure the KL of the weights alone"),
    ("--conversations", "also measure KL in conversations through the chat template, by domain"),
    ("--answers", "also compare greedy answers with the base's"),
    ("--speed", "also measure tokens per second and memory"),
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="GGUF",
        help="files to measure: paths or hf://owner/name/file.gguf",
    )
    parser.add_argument("--base", required=True, metavar="GGUF", help="the full-precision GGUF")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the report"
    )
    for flag, metavar, help_text in _OPTIONS:
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=help_text)
    for flag, help_text in _FLAGS:
        parser.add_argument(flag, action="store_true", help=help_text)


def chosen(arguments: argparse.Namespace) -> list[str]:
    """Return what was given of the evaluators' options."""
    given = vars(arguments)
    found = [
        f"{flag}={value}" for flag, _, _ in _OPTIONS for value in given[flag[2:].replace("-", "_")]
    ]
    return found + [flag for flag, _ in _FLAGS if given[flag[2:].replace("-", "_")]]
