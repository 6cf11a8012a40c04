"""The limits of a sandboxed call, and the error for one that exceeded them."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import QuantkitError


@dataclass(frozen=True)
class Limits:
    """The limits of the whole process tree. `memory_bytes` is memory that is really taken: code of
    libraries and weights that are only mapped do not count. A limit that the caller itself has and
    that is lower stays.
    """

    cpu_seconds: int = 60
    wall_seconds: int = 120
    memory_bytes: int = 4 * 2**30
    file_bytes: int = 0
    n_processes: int = 64  # threads, too


class Crashed(QuantkitError):
    """The sandboxed process did not answer. `reason` says why, as a clause without a full stop."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"The sandboxed process {reason}.", remedy)
        self.reason = reason
