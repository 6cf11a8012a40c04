"""What goes between the processes of a job: what the parent tells the keeper and the worker, and
what the keeper tells at the end. Named tuples: to import dataclasses takes the child too long.
"""

from __future__ import annotations

from typing import NamedTuple


class Told(NamedTuple):
    """A job as its processes get it: limits (of `limits.Limits`), paths, and descriptors."""

    function: str
    arguments: dict[str, object]
    cpu_seconds: int
    wall_seconds: int
    memory_bytes: int
    file_bytes: int
    n_processes: int
    path: list[str]
    readable: list[str]
    writable: list[str]
    folders: list[str]  # those of `writable`
    mapped_bytes: int
    address_bytes: int | None
    without: list[str]
    inherited: list[int]
    result: int
    verdict: int
    lifeline: int
    home: str = ""
    owns_home: bool = False
    total_bytes: int = 0  # that may lie in `folders`: the keeper adds what is there already


class Verdict(NamedTuple):
    """How the worker ended, as its init and its keeper saw it. `why` names a limit."""

    status: int | None = None  # as of wait(2)
    why: str | None = None
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    namespaces: tuple[str, ...] = ()
