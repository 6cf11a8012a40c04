"""The target size of a file: four kinds of target, each with what the user wrote."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction

from quantkit.config.devices import DEVICES, named
from quantkit.errors import UsageError
from quantkit.ggml.types import FILE_TYPES, STOCK_MIXES
from quantkit.sizes import parse_bytes

CONTEXT = 8192  # tokens: a long conversation
MOST_CONTEXT = 4_000_000

BytesOf = Callable[[str], int]
ContextBytes = Callable[[int], int]


@dataclass(frozen=True)
class _Asked(ABC):
    """One size that was asked for. `kind` is its name in `config.json` and on the API."""

    kind: str = field(init=False)
    value: str

    @abstractmethod
    def limit_bytes(
        self, n_parameters: int, stock_bytes: BytesOf, context_bytes: ContextBytes
    ) -> int:
        """Return the budget in bytes of the whole file.

        `stock_bytes(label)` gives the size of a stock mix of this model, `context_bytes(n)` what n
        tokens of context take beside the file.
        """

    def within(self, limit: int, largest: int) -> int:
        """Return the budget where the largest quantized file has `largest` bytes."""
        return limit

    def below(self, limit: int, smallest: int) -> str:
        """Say why a budget below the smallest possible file cannot be met."""
        return (
            f"The budget of {limit:,} bytes is below the smallest possible file,"
            f" {smallest:,} bytes."
        )

    @property
    def n_context(self) -> int | None:
        """Tokens of context that the target counts; None where it counts none."""
        return None

    @property
    def mix(self) -> str | None:
        """The stock mix that the target names, if any."""
        return None


@dataclass(frozen=True)
class BitsPerWeight(_Asked):
    """So many bits for each weight of the model."""

    kind: str = field(default="bpw", init=False)

    def __post_init__(self) -> None:
        value = self.value.strip().replace(",", ".")
        try:
            bpw = float(value)
        except ValueError:
            bpw = 0.0
        if not 0.5 <= bpw <= 32:
            raise UsageError(
                f"{self.value} is not a number of bits per weight.",
                "Use something like 4.5.",
            )
        object.__setattr__(self, "value", value)

    def limit_bytes(
        self, n_parameters: int, stock_bytes: BytesOf, context_bytes: ContextBytes
    ) -> int:
        return int(Fraction(self.value) * n_parameters / 8)

    def __str__(self) -> str:
        return f"{self.value} bits per weight"


@dataclass(frozen=True)
class FileSize(_Asked):
    """So many bytes, as in 5.5GB."""

    kind: str = field(default="size", init=False)

    def __post_init__(self) -> None:
        parse_bytes(self.value)

    def limit_bytes(
        self, n_parameters: int, stock_bytes: BytesOf, context_bytes: ContextBytes
    ) -> int:
        return parse_bytes(self.value)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class LikeMix(_Asked):
    """The size of llama.cpp's own file of a mix of types, as in Q4_K_M."""

    kind: str = field(default="like", init=False)

    def __post_init__(self) -> None:
        label = self.value.strip().upper().replace("-", "_")  # q4_k_m, as Ollama writes it
        if label not in FILE_TYPES:
            near = get_close_matches(label, STOCK_MIXES, 3)
            raise UsageError(
                f"There is no stock mix {self.value!r}.",
                (f"Did you mean {' or '.join(near)}? " if near else "")
                + f"Use one of {', '.join(STOCK_MIXES)}.",
            )
        object.__setattr__(self, "value", label)

    def limit_bytes(
        self, n_parameters: int, stock_bytes: BytesOf, context_bytes: ContextBytes
    ) -> int:
        return stock_bytes(self.value)

    @property
    def mix(self) -> str:
        return self.value

    def __str__(self) -> str:
        return f"like {self.value}"


@dataclass(frozen=True)
class FitsMemory(_Asked):
    """The memory that a context leaves, as in 8GB@8192: what llama.cpp takes for the context
    is not left to the file. 8GB alone is with `CONTEXT` tokens; gpu-8gb and other `DEVICES` stand
    for what a model can use of their memory.
    """

    kind: str = field(default="fits", init=False)

    def __post_init__(self) -> None:
        memory, at, context = self.value.partition("@")
        memory = named(memory) or memory.strip()
        object.__setattr__(self, "value", f"{memory}@{context if at else CONTEXT}")
        self.memory_and_context()

    def memory_and_context(self) -> tuple[int, int]:
        """Return bytes of memory and tokens of context. Raise UsageError."""
        memory, _, context = self.value.partition("@")
        if not re.fullmatch(r"\d{1,7}", context) or not 1 <= int(context) <= MOST_CONTEXT:
            raise UsageError(
                f"{self.value!r} does not give a memory size and a context.",
                "Write 8GB@8192 (bytes of memory and tokens of context) or gpu-8gb@8192.",
            )
        device = DEVICES.get(memory)
        try:
            return parse_bytes(device.free if device else memory), int(context)
        except UsageError as error:
            raise UsageError(
                error.message, f"Write a size such as 7GB, or one of {', '.join(DEVICES)}."
            ) from None

    def limit_bytes(
        self, n_parameters: int, stock_bytes: BytesOf, context_bytes: ContextBytes
    ) -> int:
        """Return what the memory leaves, which may be nothing at all."""
        memory, n_tokens = self.memory_and_context()
        return memory - context_bytes(n_tokens)

    def within(self, limit: int, largest: int) -> int:
        """Return at most `largest`: more memory than the model can use is no mistake."""
        return min(limit, largest)

    def below(self, limit: int, smallest: int) -> str:
        memory, context = self.memory_and_context()
        return (
            f"The model does not fit in {memory / 1e9:g} GB with a context of {context:,} tokens:"
            f" its smallest file has {smallest / 1e9:.2f} GB and the context takes"
            f" {(memory - limit) / 1e9:.2f} GB."
        )

    @property
    def n_context(self) -> int:
        return self.memory_and_context()[1]

    def __str__(self) -> str:
        memory, context = self.value.split("@")
        device = DEVICES.get(memory)
        return f"fits {device.title if device else memory} with a context of {int(context):,}"


Target = BitsPerWeight | FileSize | LikeMix | FitsMemory
DEFAULT_TARGET = LikeMix("Q4_K_M")
FAMILY = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")  # the sizes of --family
