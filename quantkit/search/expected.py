"""Estimate the KL after tuning, by which a search decides whose file is tuned afterwards.

Tuning mends what lies in blocks, and nothing of a table of embeddings or an output head: a byte
spent there is worth more than the KL of the untuned file says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.optimizer import Evaluator
from quantkit.search.propose import Costs
from quantkit.tensors import is_in_block

LEFT = 0.6  # of the blocks' share of the KL, after tuning: dev/LOG.md


class AfterTuning:
    """An evaluator that estimates a candidate's KL after tuning: a share `LEFT` of it, plus the
    full estimated `costs` of its tensors outside of blocks.
    """

    def __init__(self, evaluator: Evaluator, space: SearchSpace, costs: Costs) -> None:
        self._evaluator, self.n_batch = evaluator, evaluator.n_batch
        self.n_sequences, self.n_ctx = evaluator.n_sequences, evaluator.n_ctx
        self._outside = [
            (i, costs[i]) for i, name in enumerate(space.tensors) if not is_in_block(name)
        ]

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        """Return the expected KL of each candidate on the sequences first..last."""
        scores = self._evaluator.kl_of(candidates, first, last)
        return [
            LEFT * score + (1 - LEFT) * sum(cost[choices[i]] for i, cost in self._outside)
            for score, choices in zip(scores, candidates, strict=True)
        ]

    def set_parent(self, choices: Choices) -> None:
        self._evaluator.set_parent(choices)


def costs_after(space: SearchSpace, costs: Costs) -> Costs:
    """Return the estimated costs that are left after tuning."""
    return [
        cost * LEFT if is_in_block(name) else cost
        for name, cost in zip(space.tensors, costs, strict=True)
    ]
