"""The one error type that reaches users."""

from __future__ import annotations


class QuantkitError(Exception):
    """Something a user can act on: what happened (`message`) and what to do about it (`remedy`).

    Both are plain sentences. The command line prints them and exits with 1; a run writes them to
    its last event.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class UsageError(QuantkitError):
    """The command or form was filled in wrongly and nothing was started: exit status 2."""
