"""RCO beside EvoPress on a toy that answers at once: the same tokens, gradients counted as three.

    python dev/experiments/rco_toy.py [--seeds 3] [--tokens 100000] [--tensors 60]

A model to second order: every choice of every tensor moves the log-probability of a token's label
by a random amount, and the KL is half the mean square of their sum (Gauss-Newton). Amounts of one
tensor's choices correlate by half, those of neighboring tensors by `together`. Estimates are the
true damages of single choices, off by a deviation of 0.3 in the logarithm. Answers are judged on
other tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(1, str(Path(__file__).parents[2] / "tests" / "support"))

import numpy as np
from relaxed_types import RelaxedTypes, Table
from search_spaces import make_space

from quantkit.markdown import table
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.evopress import Schedule, begin, evolve
from quantkit.search.optimizer import Problem
from quantkit.search.propose import Costs, knapsack, uniform

N_CHOICES, N_UNSEEN = 6, 64


class Quadratic:
    """An evaluator and a mixture in one."""

    n_ctx, n_batch, n_sequences = 64, 2, 24

    def __init__(self, n_tensors: int, together: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        scales = rng.lognormal(-7, 1.0, n_tensors)[:, None]
        damages = scales * 4.0 ** -np.arange(N_CHOICES) * rng.lognormal(0, 0.3, (1, N_CHOICES))
        shape = (N_CHOICES, (self.n_sequences + N_UNSEEN) * self.n_ctx)
        common = rng.standard_normal(shape[1])
        rows = []
        for own in damages:
            of_tensor = rng.standard_normal(shape[1])
            common = together**0.5 * common + (1 - together) ** 0.5 * of_tensor
            noise = rng.standard_normal(shape)
            rows.append(np.sqrt(2 * own)[:, None] * (common + noise) / 2**0.5)
        self.moves = np.array(rows)  # (n_tensors, n_choices, n_tokens)
        self.estimates: Costs = list(damages * rng.lognormal(0, 0.3, (n_tensors, 1)))
        units = rng.choice([9, 27], n_tensors) * 1000
        whole = make_space([(u * np.arange(2, 2 + N_CHOICES)).tolist() for u in units.tolist()])
        n_bytes = whole.n_bytes(np.full(n_tensors, 2))
        self.space: SearchSpace = replace(whole, limit_bytes=n_bytes)

    def kl(self, choices: Choices, first: int, last: int) -> np.ndarray:
        own = slice(first * self.n_ctx, last * self.n_ctx)
        total = self.moves[np.arange(len(choices)), choices, own].sum(0)
        return (total**2 / 2).reshape(last - first, 8, -1).mean(2)

    def kl_of(self, candidates: Sequence[Choices], first: int, last: int) -> list[np.ndarray]:
        return [self.kl(choices, first, last) for choices in candidates]

    def set_parent(self, choices: Choices) -> None:
        """Nothing is kept of a parent."""

    def unseen(self, choices: Choices) -> float:
        return float(self.kl(choices, self.n_sequences, self.n_sequences + N_UNSEEN).mean())

    def slopes(self, shares: Table, sequences: Sequence[int]) -> tuple[float, Table]:
        n = self.n_ctx
        own = np.concatenate([np.arange(n * i, n * i + n) for i in sequences])
        moves = self.moves[:, :, own]
        total = np.einsum("ik,ikt->t", shares, moves)
        return float((total**2).mean() / 2), moves @ total / len(own)

    def evopress(self, n_tokens: int, seed: int, *more: Choices) -> Choices:
        space, costs = self.space, self.estimates
        plan = Schedule.of(n_tokens, self.n_sequences, self.n_batch)
        plan = replace(plan, least_gain=-np.inf)
        first = [(knapsack(space, costs), ""), *((c, "") for c in uniform(space, costs))]
        state = begin(self, plan, [*first, *((c, "") for c in more)], seed)
        state = evolve(space, self, costs, plan, state, lambda _: None)
        return np.array(state.best.choices)

    def rco(self, n_tokens: int, seed: int, is_hard: bool, is_warm: bool) -> Choices:
        problem = Problem(self.space, self, self.estimates, lambda: [], n_tokens, seed)
        optimizer = RelaxedTypes(self, is_hard, is_warm)  # type: ignore[arg-type]
        return np.array(optimizer.run(problem, None, lambda _: None).choices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--tensors", type=int, default=60)
    given = parser.parse_args()
    rows = []
    for together in (0.0, 0.5, 0.9):
        found: dict[str, list[float]] = {}
        for seed in range(given.seeds):
            toy, n = Quadratic(given.tensors, together, seed), given.tokens
            first = toy.unseen(knapsack(toy.space, toy.estimates))
            warm = toy.rco(n // 2, seed, False, True)
            answers = {
                "EvoPress": toy.evopress(n, seed),
                "RCO": toy.rco(n, seed, False, False),
                "RCO warm": toy.rco(n, seed, False, True),
                "RCO hard": toy.rco(n, seed, True, False),
                "RCO+E": toy.evopress(n // 2, seed, warm),
            }
            for name, choices in answers.items():
                assert toy.space.fits(choices)
                found.setdefault(name, []).append(toy.unseen(choices) / first)
            print(together, seed, {k: round(v[-1], 3) for k, v in found.items()}, flush=True)
        for name, ratios in found.items():
            shown = " ".join(f"{r:.3f}" for r in ratios)
            rows.append([f"{together:g}", name, shown, f"{np.mean(ratios):.3f}"])
    print(table(["together", "search", "KL to the knapsack's, by seed", "mean"], rows))


if __name__ == "__main__":
    main()
