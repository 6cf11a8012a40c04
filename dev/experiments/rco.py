"""Types by gradients over logits (RCO) beside EvoPress: the same time, levels and text.

    python dev/experiments/rco.py RUN [--bpw 2.5,4.5] [--seconds 60] [--seeds 3] [--text FILE]

RUN is the folder of a run that has its levels (`quantkit run`, not cleaned). Every search gets so
many seconds of processor time (others may be at work here), on the sequences that decide; what it
finds is judged on windows of a text that the run has not read, else on a quarter of the held-out
sequences, which no search has seen. `relaxed_types.py` is the optimizer. Searches:

    knapsack   on the run's estimates (nothing is searched)
    Fisher     the knapsack on the Fisher information along every error, from gradients at the base
    diagonal   the same by the diagonal of the Fisher information alone
    EvoPress   ours, from the knapsack and uniform steps; it may go on until the time is over
    RCO        from equal logits, mixtures of choices
    RCO hard   from equal logits, drawn allocations
    RCO warm   from logits that follow the run's estimates, mixtures of choices
    Fisher+E   EvoPress with the Fisher estimates in the place of the run's, their time included
    RCO+E      RCO warm for half of the time, then EvoPress from its answer, too
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import numpy as np
import torch
from relaxed_types import Mixture, RelaxedTypes
from safetensors.numpy import load_file
from search_efficiency import Judge, judge_of, n_weights

from quantkit.markdown import table
from quantkit.model.blockwise import BlockwiseModel, load_model, load_tokenizer
from quantkit.model.row_maps import load_row_maps
from quantkit.run.folder import RunDir
from quantkit.search.allocation import Choices, SearchSpace
from quantkit.search.evopress import Schedule, SearchState, begin, evolve
from quantkit.search.fitness import Fitness
from quantkit.search.optimizer import Problem
from quantkit.search.propose import Costs, estimated_costs, knapsack, uniform
from quantkit.search.targets import Targets
from quantkit.search.weights import Weights
from quantkit.sources.snapshot import load_snapshot

N_TOKENS, N_SAMPLES = 128, 96  # of a sample of the Fisher information; samples
N_WINDOWS = 40  # of a text, to judge by


class TimeIsUp(Exception):
    """Ends a search."""


class Clock:
    """Seconds of processor time that a search may take, from its making."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._begun = seconds, time.process_time()

    def done(self, _: int = 0) -> float:
        return (time.process_time() - self._begun) / self.seconds


class Bench:
    """One run's levels at one budget."""

    def __init__(self, judge: Judge, mixture: Mixture, space: SearchSpace, seconds: float) -> None:
        self.judge, self.mixture, self.space, self.seconds = judge, mixture, space, seconds
        self.costs = estimated_costs(space)

    def knapsack(self, seed: int) -> Choices:
        return knapsack(self.space, self.costs)

    def fisher(self, seed: int) -> Choices:
        return knapsack(self.space, self.fisher_costs(seed)[0])

    def diagonal(self, seed: int) -> Choices:
        return knapsack(self.space, self.fisher_costs(seed)[1])

    def fisher_costs(self, seed: int) -> tuple[Costs, Costs]:
        """The two estimates; what is not in the model has those of the run."""
        tables = self.mixture.curvature(N_TOKENS, N_SAMPLES, seed)

        def costs(table: np.ndarray) -> Costs:
            rows = zip(self.costs, table, strict=True)
            return [row[: len(own)] if row.any() else own for own, row in rows]

        along, diagonal = map(costs, tables)
        return along, diagonal

    def evopress(
        self,
        seed: int,
        clock: Clock | None = None,
        costs: Costs | None = None,
        *more: Choices,
    ) -> Choices:
        """`more` are proposals beside the usual ones."""
        clock, costs = clock or Clock(self.seconds), costs or self.costs
        plan = Schedule.of(10**12, self.judge.n_sequences, self.judge.n_batch)
        plan = replace(plan, least_gain=-np.inf)
        first = [(knapsack(self.space, costs), "knapsack")]
        first += [(choices, "uniform") for choices in uniform(self.space, costs)]
        first += [(choices, "more") for choices in more]
        state = begin(self.judge, plan, first, seed)

        def note(newest: SearchState) -> None:
            nonlocal state
            state = newest
            if clock.done() >= 1:
                raise TimeIsUp

        try:
            state = evolve(self.space, self.judge, costs, plan, state, note)
        except TimeIsUp:
            pass
        print(f"    {state.generation} generations, {state.n_tokens:,} tokens", flush=True)
        return np.array(state.best.choices)

    def fisher_evopress(self, seed: int) -> Choices:
        clock = Clock(self.seconds)
        return self.evopress(seed, clock, self.fisher_costs(seed)[0])

    def rco(
        self, seed: int, is_hard: bool = False, is_warm: bool = False, share: float = 1.0
    ) -> Choices:
        clock = Clock(share * self.seconds)
        problem = Problem(self.space, self.judge, self.costs, lambda: [], 1, seed)
        optimizer = RelaxedTypes(self.mixture, is_hard, is_warm, clock.done)
        step = optimizer.run(problem, None, lambda _: None)
        print(f"    {step.n_tokens:,} tokens, {clock.done():.2f} of the time", flush=True)
        return np.array(step.choices)

    def rco_evopress(self, seed: int) -> Choices:
        clock = Clock(self.seconds)
        found = self.rco(seed, is_warm=True, share=0.5)
        return self.evopress(seed, clock, None, found)

    def searches(self) -> dict[str, Callable[[int], Choices]]:
        return {
            "knapsack": self.knapsack,
            "EvoPress": self.evopress,
            "RCO": self.rco,
            "RCO warm": lambda seed: self.rco(seed, is_warm=True),
            "Fisher+E": self.fisher_evopress,
            "RCO+E": self.rco_evopress,
            "RCO hard": lambda seed: self.rco(seed, is_hard=True),
            "Fisher": self.fisher,
            "diagonal": self.diagonal,
        }


class Levels:
    """A run's levels, and models that they are put into."""

    def __init__(self, folder: Path, space: SearchSpace) -> None:
        self._directory, self._space = RunDir(folder.absolute()), space
        self._maps = load_row_maps(self._directory.artifacts.row_maps)
        root = self._directory.artifacts.levels
        self._files = {c.file: root / c.file for of_tensor in space.candidates for c in of_tensor}
        self._scratch = Path(tempfile.mkdtemp(prefix="rco-"))
        atexit.register(shutil.rmtree, self._scratch, ignore_errors=True)

    def _model(self) -> BlockwiseModel:
        """Another copy of the original, in float32."""
        return BlockwiseModel(load_model(load_snapshot(self._directory).folder, torch.float32))

    def mixture(self) -> Mixture:
        """On the sequences that the search has."""
        model = self._model()
        ids = load_file(self._directory.artifacts.tokens)["heldout"]
        n_vocab = model.model.get_output_embeddings().weight.shape[0]
        targets = Targets(self._scratch / "targets", ids.size, n_vocab, model.device)
        weights = Weights(model, self._space, self._maps, self._files)
        return Mixture(model, self._space, self._maps, weights, ids, targets)

    def samples_of(self, text: Path, n_ctx: int) -> Callable[[Choices], np.ndarray]:
        """What gives KLs (n_windows, parts) of an allocation on windows of a text."""
        tokenizer = load_tokenizer(load_snapshot(self._directory).folder)
        stream = tokenizer(text.read_text("utf-8"), verbose=False).input_ids
        n = min(N_WINDOWS, len(stream) // n_ctx)
        ids = np.array(stream[: n * n_ctx]).reshape(n, n_ctx)
        path = self._scratch / "judge"
        judge = Fitness(self._model(), self._space, self._maps, self._files, ids, path)

        @cache
        def samples(choices: tuple[int, ...]) -> np.ndarray:
            return judge.kl(np.array(choices, np.int64), 0, n)

        return lambda choices: samples(tuple(choices.tolist()))


def beside(samples: np.ndarray, other: np.ndarray) -> str:
    """How much lower than another, in percent of it, with two standard errors of sequences."""
    saved = (other - samples).mean(1)
    mean, error = saved.mean(), 2 * saved.std(ddof=1) / np.sqrt(len(saved))
    return f"{100 * mean / other.mean():+.2f} ± {100 * error / other.mean():.2f} %"


def table_of(title: str, found: Mapping[str, Sequence[np.ndarray]]) -> str:
    """A row for every search."""
    ours, rows = np.mean(found["EvoPress"], axis=0), []
    for name, each in found.items():
        mean, kls = np.mean(each, axis=0), " ".join(f"{s.mean():.5f}" for s in each)
        rows.append([name, kls, f"{mean.mean():.5f}", beside(mean, ours)])
    return table([title, "KL, by seed", "mean", "below EvoPress"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--bpw", default="2.5,4.5")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of processor, for every search"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="to judge by")
    parser.add_argument("--only", help="searches, by commas; EvoPress is always among them")
    parser.add_argument("--out", type=Path, help="numbers as JSON")
    given = parser.parse_args()
    judge, whole = judge_of(given.run, "cpu")
    levels = Levels(given.run, whole)
    mixture = levels.mixture()
    samples = levels.samples_of(given.text, judge.n_ctx) if given.text else judge.samples
    rows = []
    for bpw in map(float, given.bpw.split(",")):
        space = replace(whole, limit_bytes=int(bpw * n_weights(given.run) / 8))
        bench = Bench(judge, mixture, space, given.seconds)
        searches = {
            name: search
            for name, search in bench.searches().items()
            if not given.only or name in (*given.only.split(","), "EvoPress")
        }
        found: dict[str, list[np.ndarray]] = {name: [] for name in searches}
        for seed in range(given.seeds):
            for name, search in searches.items():
                began = time.process_time()
                choices = search(seed)
                seconds = time.process_time() - began
                assert space.fits(choices)
                found[name].append(samples(choices))
                kl = float(found[name][-1].mean())
                rows.append({"bpw": bpw, "search": name, "seed": seed, "kl": kl, "s": seconds})
                print(f"  {bpw:g}, {name}, {seed}: KL {kl:.5f}, {seconds:.0f} s", flush=True)
            print(f"\n{table_of(f'{bpw:g} bpw', found)}\n", flush=True)
            if given.out:
                given.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
