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
