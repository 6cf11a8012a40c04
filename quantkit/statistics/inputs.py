"""What is known of the inputs of a block's linear layers, in memory while its tensors are solved.

`train` decides codes and importances, `heldout` judges them: GPTQ's error under the Hessian it was
solved with never shows that it overfits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quantkit.statistics.experts import ExpertCollector
from quantkit.statistics.hessian import HessianCollector


@dataclass(frozen=True)
class InputDiagonal:
    """Mean squared inputs of a module over the train tokens: float32 (n_columns,), of stacked
    experts (n_experts, n_columns) and their token counts (n_experts,).
    """

    diagonal: NDArray[np.float32]
    n_tokens: int | NDArray[np.float32]


@dataclass(frozen=True)
class InputStatistics:
    """The Hessians of one distinct input, float32 (n, n), and the modules that read it.

    An input that no held-out token reached, as an expert's may be, has no Hessian of its own to be
    judged with: `heldout` is `train` then.
    """

    modules: tuple[str, ...]
    n_train: int
    train: torch.Tensor
    heldout: torch.Tensor
    is_judged_on_train: bool = False

    @property
    def diagonal(self) -> InputDiagonal:
        """The importances of its columns."""
        return InputDiagonal(self.train.diagonal().cpu().numpy().copy(), self.n_train)


@dataclass(frozen=True)
class ExpertStatistics:
    """The Hessians of one distinct input of some of a layer's experts, float32 (n_experts, n, n).

    `n_tokens` float32 (n_experts,) are the train tokens that the router sent; `weights` are those
    and what was lent.
    """

    modules: tuple[str, ...]  # the 3-D parameters, whose names stand for modules in row maps
    first: int  # of the layer's experts
    n_tokens: NDArray[np.float32]
    weights: NDArray[np.float32]
    train: torch.Tensor
    heldout: torch.Tensor

    @property
    def diagonal(self) -> InputDiagonal:
        """The importances of every expert's columns."""
        diagonals = self.train.diagonal(dim1=1, dim2=2)
        return InputDiagonal(diagonals.cpu().numpy().copy(), self.n_tokens)


@dataclass(frozen=True)
class BlockStatistics:
    """Distinct inputs of one block, of the head, or of a table of embeddings, in the order in which
    the model meets them.
    """

    inputs: tuple[InputStatistics, ...] = ()
    experts: tuple[ExpertStatistics, ...] = ()

    @classmethod
    def of(
        cls,
        collectors: Mapping[str, HessianCollector],
        experts: Mapping[str, ExpertCollector] | None = None,
    ) -> BlockStatistics:
        """Take the collectors' Hessians, `train` and `heldout`; their sums are used up."""
        return cls(_inputs(**collectors), _experts(**experts) if experts else ())

    def diagonals(self) -> dict[str, InputDiagonal]:
        """Return the importances by module."""
        return {
            module: diagonal
            for found in (self.inputs, self.experts)
            for statistics in found
            for diagonal in [statistics.diagonal]
            for module in statistics.modules
        }


def _inputs(train: HessianCollector, heldout: HessianCollector) -> tuple[InputStatistics, ...]:
    judges = heldout.means()
    return tuple(
        InputStatistics(
            train.members[group],
            train.n_tokens[group],
            hessian,
            judges.get(group, hessian),
            group not in judges,
        )
        for group, hessian in train.means().items()
    )


def _experts(train: ExpertCollector, heldout: ExpertCollector) -> tuple[ExpertStatistics, ...]:
    judges = heldout.means()
    return tuple(
        ExpertStatistics(
            train.members[group],
            train.experts[group].start,
            train.n_tokens[group].cpu().numpy(),
            train.weights[group].cpu().numpy(),
            hessians,
            judges.get(group, hessians),
        )
        for group, hessians in train.means().items()
    )
