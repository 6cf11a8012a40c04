"""A base class whose objects close at the end of a `with`: they hold memory, a file or a
process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """A context manager that calls `close()` at the end."""

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
