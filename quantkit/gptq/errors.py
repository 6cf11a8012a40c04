"""What `errors.json` says: how far every tensor in every type is from the original, and what was
not made as it was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.tensors import Fallback


@dataclass(frozen=True)
class Error:
    """How far one quantized tensor is from the original.

    `relative` is the output's squared error over its power, on held-out inputs (without statistics:
    that of the weights).
    `nats` estimates the KL divergence per token that it causes, None where the Fisher information
    is not known.
    """

    relative: float
    nats: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """The smaller the better; an expert that no gradient reached is ranked by its output."""
        return self.relative if self.nats is None else self.nats, self.relative


@dataclass(frozen=True)
class TypeErrors:
    """One tensor in one type: the method that won, and the errors of all."""

    method: str
    errors: dict[str, Error]


@dataclass(frozen=True)
class ExpertErrors(TypeErrors):
    """The same of stacked experts, and how many of them each method made."""

    experts: dict[str, int]


@dataclass(frozen=True)
class Damping:
    """The damping of a Hessian that was not positive definite at the usual one."""

    modules: tuple[str, ...]
    damping: float


@dataclass(frozen=True)
class Errors:
    """Of all tensors, or of those that are solved together: tensor -> type -> errors."""

    errors: dict[str, dict[str, ExpertErrors | TypeErrors]]
    fallbacks: tuple[Fallback, ...]
    dampings: tuple[Damping, ...]
