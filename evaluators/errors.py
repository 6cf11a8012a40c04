"""The one error type of this package."""

from __future__ import annotations


class EvaluationError(Exception):
    """Something a user can act on: what happened (`message`) and what to do about it (`remedy`).

    Both are plain sentences. The command lines print them on stderr and exit with 1.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


def printable(text: str) -> str:
    """Return a stranger's words on one line, without control characters, of at most 2,000
    characters.
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())


class NotFinite(EvaluationError):
    """A file gives logits that are no numbers."""
