"""Judge candidates on many devices, each by one of several equal evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from quantkit.search.allocation import Choices
from quantkit.search.optimizer import Evaluator


class Workers:
    """An evaluator of evaluators, one thread for each.

    A candidate's numbers are those of one evaluator alone, and the order of the answers is that of
    the candidates: how many workers there are does not show.
    """

    def __init__(self, evaluators: Sequence[Evaluator]) -> None:
        self._evaluators = list(evaluators)
        self._pool = ThreadPoolExecutor(len(self._evaluators), "worker")
        one = self._evaluators[0]
        self.n_sequences, self.n_ctx, self.n_batch = one.n_sequences, one.n_ctx, one.n_batch

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        """Return the KL of each candidate on the sequences first..last. One by itself is judged by
        every worker: it is the parent, whose hidden states each of them keeps.
        """
        n = len(self._evaluators)
        shares = (
            [list(candidates)] * n if len(candidates) == 1 else [candidates[i::n] for i in range(n)]
        )

        def work(i: int) -> list[np.ndarray]:
            return self._evaluators[i].kl_of(shares[i], first, last)

        answers = list(self._pool.map(work, range(n)))
        return [answers[i % n][i // n] for i in range(len(candidates))]

    def set_parent(self, choices: Choices) -> None:
        for evaluator in self._evaluators:
            evaluator.set_parent(choices)
