"""Leaving a `with` closes: for whatever holds memory, a file or a process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """A context manager of anything with `close()`."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held. Harmless when done before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
