"""Say which programs there are: python -m evaluators."""

from __future__ import annotations

import sys

_PROGRAMS = {
    "perplexity": "perplexity of a file on a text",
    "kl": "how far files are from the base: KL on texts, or on domains",
    "generation": "greedy answers beside those of the base",
    "tasks": "tasks of lm-evaluation-harness",
    "zeroshot": "multiple choice that needs no harness",
    "speed": "speed, load time and memory",
    "overlap": "what a text or a task shares with calibration text",
    "compare": "several files of one model in one table",
}


def main() -> int:
    """Print the programs. Returns 2: none was named."""
    print("Name a program; each has --help:\n", file=sys.stderr)
    for name, about in _PROGRAMS.items():
        print(f"  python -m evaluators.{name:<12}{about}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
