"""Of `rco.py`: choose types by gradients over their logits, under an exact budget.

Follows RCO (Helcig and Alistarh 2026, arXiv:2605.00649). Every tensor's choices have logits; their
softmax, at a temperature that falls, says how much of each is in the tensor. Expected bytes equal
the budget at all times: slopes and Adam's momentum are projected onto the tangent of that surface,
and what a step drifts off it is taken back by moving all logits along the bits per weight. The
forward pass has either the mixture of each tensor's choices (`soft`), or an allocation drawn by
Gumbel noise and a knapsack, through which gradients pass straight (`hard`). The answers are
knapsacks at -log p; the real KL decides between those of the last steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.model.blockwise import BlockwiseModel
from quantkit.model.row_maps import RowMap
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.optimizer import MOST_SEQUENCES, Problem, Step
from quantkit.search.propose import Costs, knapsack
from quantkit.search.targets import Targets
from quantkit.search.weights import Weights

_log = logging.getLogger(__name__)

Table = npt.NDArray[np.float64]
"""A number for every choice: (n_tensors, most choices), 0 where a tensor has fewer."""

_RATE, _MOMENTUM, _SQUARES = 0.1, 0.9, 0.99  # Adam's
_HOT, _COLD = 1.0, 0.1  # temperatures of the first and the last step
_SHARE_OF_STEPS = 0.8  # of the tokens; the rest judges answers
_BACKWARD = 3  # a pass with gradients is worth so many without
_SURE = 0.6  # mean of the largest share of every tensor, to begin from estimated costs
_N_ANSWERS = 3  # of the last third of the steps, that are judged


@dataclass(frozen=True)
class Surface:
    """The surface of all logits whose expected bytes are the budget."""

    n_bytes: Table
    bits: Table  # per weight
    is_choice: npt.NDArray[np.bool_]
    budget: float  # of what is searched

    @classmethod
    def of(cls, space: SearchSpace) -> Surface:
        bits = np.zeros(space.padded_bytes.shape)
        for row, own in zip(bits, space.candidates, strict=True):
            row[: len(own)] = [c.qtype.bpw for c in own]
        is_choice = np.arange(bits.shape[1]) < space.n_choices[:, None]
        sizes = space.padded_bytes.astype(np.float64)
        budget = float(np.clip(space.limit_bytes - space.fixed_bytes, *_range(sizes, is_choice)))
        return cls(sizes, bits, is_choice, budget)

    def shares(self, logits: Table, temperature: float) -> Table:
        """Return how much of every choice is in its tensor: softmax of the rows."""
        scaled = np.where(self.is_choice, logits / temperature, -np.inf)
        powers = np.exp(scaled - scaled.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def normal(self, shares: Table) -> Table:
        """Return the slope of the expected bytes over the logits, of length 1."""
        found = shares * (self.n_bytes - (shares * self.n_bytes).sum(1, keepdims=True))
        return found / max(float(np.linalg.norm(found)), 1e-30)

    def costs(self, shares: Table, noise: Table | None = None) -> Costs:
        """Return -log of the shares, less the noise, by tensor: what a knapsack makes small."""
        logs = np.log(np.maximum(shares, 1e-30)) + (0.0 if noise is None else noise)
        counts = self.is_choice.sum(1).tolist()
        return [-row[:n] for row, n in zip(logs, counts, strict=True)]

    def retract(self, logits: Table, temperature: float, along: Table | None = None) -> Table:
        """Move all logits along the bits of their choices until the expected bytes are the budget:
        bytes rise with every such step.
        """
        way = self.bits if along is None else along

        def excess(t: float) -> float:
            shares = self.shares(logits + t * way, temperature)
            return float((shares * self.n_bytes).sum()) - self.budget

        low, high = -1.0, 1.0
        while excess(low) > 0 and low > -1e9:
            low *= 2
        while excess(high) < 0 and high < 1e9:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle) > 0 else (middle, high)
        return logits + low * way

    def logits_of(self, costs: Costs) -> Table:
        """Return logits on the surface that follow estimated costs and a price of bytes, as sure of
        them as `_SURE` says.
        """
        table = np.zeros(self.bits.shape)
        for row, cost in zip(table, costs, strict=True):
            row[: len(cost)] = -np.asarray(cost)
        prices = self.n_bytes / self.n_bytes.max()
        scale = float(np.abs(table).max()) or 1.0
        for _ in range(60):
            found = self.retract(table / scale, 1.0, prices)
            if self.shares(found, 1.0).max(1).mean() >= _SURE:
                break
            scale /= 1.5
        return np.where(self.is_choice, found - found.max(1, keepdims=True), 0.0)


def _range(sizes: Table, is_choice: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """A hair inside what the smallest and the largest choices come to."""
    least, most = np.where(is_choice, sizes, np.inf).min(1).sum(), sizes.max(1).sum()
    return float(least + 1e-6 * (most - least)), float(most - 1e-6 * (most - least))


@dataclass
class Descent:
    """Adam on the surface."""

    surface: Surface
    logits: Table
    momentum: Table = field(init=False)
    squares: Table = field(init=False)
    n: int = 0

    def __post_init__(self) -> None:
        self.momentum, self.squares = np.zeros_like(self.logits), np.zeros_like(self.logits)

    def step(self, of_shares: Table, temperature: float) -> None:
        """Take a step by the slopes of the KL over the shares."""
        surface = self.surface
        shares = surface.shares(self.logits, temperature)
        slopes = shares * (of_shares - (shares * of_shares).sum(1, keepdims=True)) / temperature
        slopes = _tangent(slopes, surface.normal(shares))
        self.n += 1
        self.momentum = _MOMENTUM * self.momentum + (1 - _MOMENTUM) * slopes
        self.squares = _SQUARES * self.squares + (1 - _SQUARES) * slopes**2
        rate = _RATE * np.sqrt(1 - _SQUARES**self.n) / (1 - _MOMENTUM**self.n)
        moved = self.logits - rate * self.momentum / (np.sqrt(self.squares) + 1e-12)
        self.logits = np.where(surface.is_choice, surface.retract(moved, temperature), 0.0)
        there = surface.normal(surface.shares(self.logits, temperature))
        self.momentum = _tangent(self.momentum, there)


def _tangent(slopes: Table, normal: Table) -> Table:
    return slopes - float((slopes * normal).sum()) * normal


class Mixture:
    """A model whose tensors are mixtures of their choices: gives the KL and its slopes.

    All choices are kept decoded: 4 bytes a weight and choice.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        space: SearchSpace,
        maps: Mapping[str, RowMap],
        weights: Weights,
        ids: npt.NDArray[np.int64],
        targets: Targets,
    ) -> None:
        """The model must be the base as it is: `targets` are filled with what it says of the
        sequences `ids` (n_sequences, n_ctx).
        """
        self._model, self.space, self._targets = model, space, targets
        self._maps = [maps.get(name) for name in space.tensors]
        self._ids = torch.from_numpy(ids)
        self.n_sequences, self.n_ctx = ids.shape
        names = {m.parameter for m in self._maps if m is not None}
        self._parameters = {name: model.model.get_parameter(name) for name in sorted(names)}
        self._base = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._choices = [
            None if m is None else torch.stack([weights.values(i, k) for k in range(len(own))])
            for i, (m, own) in enumerate(zip(self._maps, space.candidates, strict=True))
        ]
        with torch.no_grad():
            for i in range(self.n_sequences):
                targets.put(i * self.n_ctx, self._forward(self._ids[i : i + 1]))

    def slopes(self, shares: Table, sequences: Sequence[int]) -> tuple[float, Table]:
        """Return the mean KL of the mixture on some sequences, and its slope over every share."""
        for i, map_, choices in self._mapped():
            own = torch.from_numpy(shares[i, : len(choices)]).float()
            mixed = torch.tensordot(own, choices, 1)
            map_.scatter(mixed, self._parameters[map_.parameter].data)
        kl = 0.0
        with self._watched():
            for i in sequences:
                logits = self._forward(self._ids[i : i + 1])
                loss = self._targets.kl(i * self.n_ctx, logits).mean() / len(sequences)
                loss.backward()
                kl += loss.item()
            return kl, self._products()

    def curvature(self, n_tokens: int, n_samples: int, seed: int) -> tuple[Table, Table]:
        """Estimate the KL of every choice alone, in nats per token, to second order at the base: by
        the Fisher information along its error, and by the diagonal of that alone.

        A sample is a stretch of `n_tokens` of a sequence, its labels drawn from the base.
        """
        for name, base in self._base.items():
            self._parameters[name].data.copy_(base)
        generator = torch.Generator().manual_seed(seed)
        squares = {name: torch.zeros_like(base) for name, base in self._base.items()}
        along = np.zeros(self.space.padded_bytes.shape)
        for sample in range(n_samples):
            row = sample % self.n_sequences
            places = self.n_ctx // n_tokens
            at = n_tokens * int(torch.randint(places, (1,), generator=generator).item())
            with self._watched():
                ids = self._ids[row : row + 1, at : at + n_tokens]
                log_p = self._forward(ids).log_softmax(-1)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                log_p.gather(-1, drawn).sum().backward()
                along += self._products(beside=self._base) ** 2
                for name, total in squares.items():
                    total += self._gradient(name).square()
        diagonal = np.zeros_like(along)
        for i, map_, choices in self._mapped():
            error = (choices - map_.gather(self._base[map_.parameter])).square_()
            diagonal[i, : len(choices)] = (
                error.flatten(1) @ map_.gather(squares[map_.parameter]).flatten()
            ).numpy()
        n_all = 2 * n_samples * n_tokens
        return along / n_all, diagonal / n_all

    def _mapped(self) -> Iterator[tuple[int, RowMap, torch.Tensor]]:
        """The tensors in the model: number, map, choices (n_choices, n_rows, n_columns)."""
        for i, (map_, choices) in enumerate(zip(self._maps, self._choices, strict=True)):
            if map_ is not None and choices is not None:
                yield i, map_, choices

    def _products(self, beside: Mapping[str, torch.Tensor] = {}) -> Table:
        """Of every choice, its product with the gradient of its tensor; of what it differs by from
        the weights `beside`, where these are given.
        """
        found = np.zeros(self.space.padded_bytes.shape)
        for i, map_, choices in self._mapped():
            gradient = map_.gather(self._gradient(map_.parameter)).flatten()
            found[i, : len(choices)] = (choices.flatten(1) @ gradient).numpy()
            if map_.parameter in beside:
                base = map_.gather(beside[map_.parameter]).flatten()
                found[i, : len(choices)] -= float(base @ gradient)
        return found

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None
        return gradient

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 logits (n_positions, n_vocab) of sequences (n, n_ctx), one after the other."""
        return self._model.model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The context in which the parameters of tensors get gradients."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None


class RelaxedTypes:
    """The optimizer. A step is the whole descent: what is interrupted begins again.

    `done` says how much of the search is over, of 1, after so many tokens: by default by the
    problem's tokens. With `is_warm` it begins from the estimated costs, and what their knapsack
    answers is judged, too; else from equal logits.
    """

    unit = "descent"

    def __init__(
        self,
        mixture: Mixture,
        is_hard: bool,
        is_warm: bool,
        done: Callable[[int], float] | None = None,
    ) -> None:
        self._mixture, self._is_hard, self._is_warm, self._done = mixture, is_hard, is_warm, done

    def run(self, problem: Problem, state: Any, on_step: Callable[[Step], None]) -> Step:
        """Descend, then judge the answers of the last steps on the sequences that decide."""
        if state is not None:
            return self.step_of(state)
        space, evaluator = problem.space, problem.evaluator
        n_sequences = min(evaluator.n_sequences, MOST_SEQUENCES)
        n_sequences -= n_sequences % evaluator.n_batch
        answers, n_tokens = self._descend(problem, n_sequences)
        if self._is_warm:
            answers.append(knapsack(space, problem.costs))
        different = {tuple(c.tolist()): c for c in answers}
        scores = evaluator.kl_of(list(different.values()), 0, n_sequences)
        n_tokens += len(different) * n_sequences * evaluator.n_ctx
        best = min(range(len(scores)), key=lambda i: float(scores[i].mean()))
        kl, stderr = (
            float(scores[best].mean()),
            float(scores[best].std() / scores[best].size ** 0.5),
        )
        found = {"choices": list(different)[best], "kl": kl, "stderr": stderr, "n": n_tokens}
        step = self.step_of(found)
        on_step(step)
        return step

    def step_of(self, state: Any) -> Step:
        row = (0, state["n"], state["kl"], state["stderr"])
        return Step(tuple(state["choices"]), state["kl"], state["stderr"], "logits", (row,), state)

    def _descend(self, problem: Problem, n_sequences: int) -> tuple[list[Choices], int]:
        """The answers of the last third, the newest last, and the tokens that it took, a pass with
        gradients counted as three.
        """
        space, evaluator, mixture = problem.space, problem.evaluator, self._mixture
        rng = np.random.default_rng(problem.seed)
        surface = Surface.of(space)
        start = (
            surface.logits_of(problem.costs)
            if self._is_warm
            else surface.retract(np.zeros(surface.bits.shape), _HOT)
        )
        descent, n_tokens = Descent(surface, start), 0
        order: list[int] = []
        answers: list[Choices] = []
        while (part := self._part(n_tokens, problem.n_tokens)) < 1:
            temperature = _HOT * (_COLD / _HOT) ** part
            if len(order) < evaluator.n_batch:
                order += rng.permutation(n_sequences).tolist()
            batch = [order.pop(0) for _ in range(evaluator.n_batch)]
            shares = surface.shares(descent.logits, temperature)
            if self._is_hard:
                drawn = knapsack(space, surface.costs(shares, rng.gumbel(size=shares.shape)))
                kl, slopes = mixture.slopes(one_hot(drawn, shares.shape[1]), batch)
            else:
                kl, slopes = mixture.slopes(shares, batch)
            descent.step(slopes, temperature)
            n_tokens += _BACKWARD * len(batch) * evaluator.n_ctx
            if part > len(answers) / _N_ANSWERS / 3 + 2 / 3:
                answers.append(self._answer(space, descent, temperature))
            _log.info("%.2f: KL %.5f", part, kl)
        return [*answers, self._answer(space, descent, _COLD)], n_tokens

    def _part(self, n_tokens: int, n_tokens_at_most: int) -> float:
        """How much of the descent is over."""
        done = n_tokens / n_tokens_at_most if self._done is None else self._done(n_tokens)
        return done / _SHARE_OF_STEPS

    def _answer(self, space: SearchSpace, descent: Descent, temperature: float) -> Choices:
        surface = descent.surface
        return knapsack(space, surface.costs(surface.shares(descent.logits, temperature)))


def one_hot(choices: Choices, width: int) -> Table:
    """Return all of every tensor at its choice."""
    found = np.zeros((len(choices), width))
    found[np.arange(len(choices)), choices] = 1.0
    return found
