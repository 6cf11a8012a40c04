"""Find out how much of a text a file may have been calibrated on: runs of 13 words that both have.

    python -m evaluators.overlap --seen CALIBRATION.txt --text FILE [--task NAME --data FILE]

The measure is that of the GPT-3 paper (Brown et al. 2020, arXiv:2005.14165, appendix C): lower
case, no punctuation, 13 words in a row. Two texts of one kind share phrases of a few words, and
hardly ever 13; a copy shares nearly all, even if its spaces, capitals or punctuation differ. Words
are compared and not tokens for that reason, and so that the share does not depend on a tokenizer.
In scripts that put no spaces between words a character counts as one.

An item of a task overlaps when it shares one such run. An item of 8 to 12 words is compared as a
whole, as there; one of fewer than 8 cannot be told from a common phrase and is not judged.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators import choice_items, command
from evaluators.choice_items import Item
from evaluators.errors import EvaluationError
from evaluators.figures import ItemOverlap, Overlap
from evaluators.texts import read_text

U64 = NDArray[np.uint64]

N_WORDS = 13
LEAST_WORDS = 8  # of an item that is judged

# Thai to Lao, Myanmar, Khmer, kana, and the Han characters: (first, last).
_SPACELESS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word of a run is lost modulo 2^64


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case and without punctuation: letters, digits and marks
    in a row, or a single character of a script that does not separate words.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return plain.translate({ord(letter): _spaced(letter) for letter in set(plain)}).split()


@cache
def _spaced(letter: str) -> str:
    if unicodedata.category(letter)[0] not in "LNM":
        return " "
    code = ord(letter)
    return f" {letter} " if any(a <= code <= b for a, b in _SPACELESS) else letter


class Seen:
    """The texts that a file was calibrated on."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._hashes: dict[str, int] = {}
        self._texts = [self._hashed(words(text)) for text in texts]
        self._runs: dict[int, U64] = {}  # by their number of words, sorted

    def overlap(self, text: str) -> Overlap:
        """Return how many of the text's runs of 13 words stand in the seen texts, too. A text of
        fewer words has none.
        """
        runs = _runs(self._hashed(words(text)), N_WORDS)
        n_seen = int(np.isin(runs, self._known(N_WORDS)).sum())
        return Overlap(len(runs), n_seen, n_seen / len(runs) if len(runs) else 0.0)

    def overlap_of_items(self, items: Sequence[Item]) -> ItemOverlap:
        """Return how many of a task's items share 13 words in a row with the seen texts, in their
        context followed by any of their choices.
        """
        n_short = n_seen = 0
        for item in items:
            said = [
                words(context + continuation)
                for context, continuation in zip(item.contexts, item.continuations, strict=True)
            ]
            n_short += all(len(w) < LEAST_WORDS for w in said)
            n_seen += any(self._is_seen(w) for w in said)
        return ItemOverlap(len(items), n_short, n_seen)

    def _is_seen(self, said: list[str]) -> bool:
        if len(said) < LEAST_WORDS:
            return False
        n = min(N_WORDS, len(said))
        return bool(np.isin(_runs(self._hashed(said), n), self._known(n)).any())

    def _known(self, n: int) -> U64:
        if n not in self._runs:
            found = [_runs(text, n) for text in self._texts]
            self._runs[n] = np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))
        return self._runs[n]

    def _hashed(self, said: Sequence[str]) -> U64:
        """A number for each word, the same for the same word."""
        for word in set(said) - self._hashes.keys():
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            self._hashes[word] = int.from_bytes(digest, "little")
        return np.array([self._hashes[word] for word in said], np.uint64)


def _runs(hashes: U64, n: int) -> U64:
    """A number for each run of `n` words: [n_words - n + 1], empty for shorter texts."""
    n_runs = len(hashes) - n + 1
    if n_runs < 1:
        return np.empty(0, np.uint64)
    found = np.zeros(n_runs, np.uint64)
    for i in range(n):  # modulo 2^64
        found = found * np.uint64(_FACTOR) + hashes[i : i + n_runs]
    return found


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    if not options.text and not options.task:
        raise EvaluationError("There is nothing to look at.", "Give --text or --task.")
    seen = Seen(map(read_text, options.seen))
    named = command.named_paths(options.text)
    found: dict[str, Any] = {
        "n_words": N_WORDS,
        "texts": {name: asdict(seen.overlap(read_text(path))) for name, path in named.items()},
    }
    if options.task:
        items = choice_items.load(options.task, data=options.data)
        found["tasks"] = {items.name: asdict(seen.overlap_of_items(items.items))}
    return found


def _show(result: dict[str, Any]) -> None:
    texts = [
        [name, f"{t['n']:,}", f"{t['n_seen']:,}", f"{100 * t['share']:.2f} %"]
        for name, t in result["texts"].items()
    ]
    if texts:
        command.print_table([f"runs of {N_WORDS} words", "all", "seen", "share"], texts)
    for name, t in result.get("tasks", {}).items():
        print(
            f"{name}: {t['n_seen']} of {t['n_items']} items overlap, {t['n_short']} are too short"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.overlap", description="Compare evaluation text with calibration text."
    )
    parser.add_argument(
        "--seen",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a UTF-8 text that the file was calibrated on",
    )
    parser.add_argument("--text", action="append", default=[], metavar="[NAME=]FILE")
    parser.add_argument("--task", choices=choice_items.TASKS)
    parser.add_argument("--data", type=Path, metavar="FILE", help="the task's items")
    parser.add_argument("--table", action="store_true", help="print a table instead of JSON")
    return command.run_command(parser, _evaluate, _show, argv)


if __name__ == "__main__":
    sys.exit(main())
