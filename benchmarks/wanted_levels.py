"""What the search loses without the smallest and largest levels, and what they take of the disk.

    quantkit run MODEL --out RUN --levels Q2_K,Q3_K,IQ4_XS,Q4_K,Q4_1,Q5_K,Q6_K,Q8_0 ...
    python benchmarks/wanted_levels.py RUN [--bpw 3.5,4.7,6] [--tokens 262144] [--seeds 2]
                                           [--device cuda]
    python benchmarks/wanted_levels.py RUN --codebooks [--bpw 2.5,3.06,4.5]
    python benchmarks/wanted_levels.py RUN --estimates [--bpw 3.5,4.7,6]

RUN has all levels. For every budget and every range of `_LEAST` and `_MOST` of
`quantkit.config.levels.wanted`, or with `--codebooks` every `_LEAST_OF_CODEBOOKS`, our search
chooses among the types of the levels that are left; its answer is judged on a quarter of the
held-out sequences, which no search has seen. "types" are the searched tensors by the type that they
got. Nothing is tuned.

`--estimates` searches nothing, runs in seconds, and is for models whose rows do not divide into
256-blocks, as if they did: the knapsack chooses by estimated nats. A tensor's at Q8_0 are the
run's; its other types cost as many times that as normal weights have squared error in them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from search_efficiency import Judge, judge_of, ours

from quantkit.config import RunConfig
from quantkit.config import levels as rule
from quantkit.config.levels import LevelPlan, plan_levels
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.base import load_base, load_specs
from quantkit.gguf_file.write import data_bytes
from quantkit.markdown import table
from quantkit.run.folder import RunDir, read_json
from quantkit.search.allocation import Choices, SearchSpace, keeping, pruned
from quantkit.search.database import load_database
from quantkit.search.expected import costs_after
from quantkit.search.propose import estimated_costs, knapsack
from quantkit.tensors import Candidate

RANGES = (
    (0.0, math.inf), (0.6, 1.9), (0.7, 1.9), (0.7, 1.6), (0.75, 1.6), (0.7, 1.45), (0.75, 1.45),
    (0.8, 1.45), (0.7, 1.3), (0.75, 1.3), (0.8, 1.3), (0.85, 1.3),
)  # fmt: skip
CODEBOOKS = (0.0, 0.6, 0.7, 0.8, 0.9, 1.0, math.inf)


class Narrow(Judge):
    """A judge of allocations in a part of its space."""

    def __init__(self, judge: Judge, space: SearchSpace, part: SearchSpace) -> None:
        self._judge = judge
        self.n_ctx, self.n_batch = judge.n_ctx, judge.n_batch
        self.n_sequences, self.n_tokens = judge.n_sequences, 0
        self._numbers = [
            np.array([whole.index(c) for c in own])
            for whole, own in zip(space.candidates, part.candidates, strict=True)
        ]

    def whole(self, choices: Choices) -> Choices:
        """The same allocation in the judge's space."""
        return np.array([own[k] for own, k in zip(self._numbers, choices, strict=True)], np.int64)

    def kl_of(self, candidates: list[Choices], first: int, last: int) -> list[np.ndarray]:
        return self._judge.kl_of([self.whole(c) for c in candidates], first, last)

    def set_parent(self, choices: Choices) -> None:
        self._judge.set_parent(self.whole(choices))

    def last_word(self, choices: Choices) -> float:
        return self._judge.last_word(self.whole(choices))


def narrowed(space: SearchSpace, plan: LevelPlan, levels: Sequence[QuantType]) -> SearchSpace:
    """The choices whose types some of these levels have."""
    allowed = {name: {types[level] for level in levels} for name, types in plan.types.items()}
    for name, own in plan.kept.items():
        allowed[name].add(own)
    kept = [
        [k for k, c in enumerate(row) if c.qtype in allowed[name]]
        for name, row in zip(space.tensors, space.candidates, strict=True)
    ]
    return pruned(keeping(space, kept))


def squared_error(qtype: QuantType) -> float:
    """The mean squared error of normal weights, columns alike."""
    weights = np.random.default_rng(0).standard_normal((256, 2048), np.float32)
    packed = native.quantize(weights, qtype, np.ones(2048, np.float32))
    return float(np.square(native.dequantize(packed, qtype) - weights).mean())


def estimated(run: Path, bpws: Sequence[float]) -> None:
    """Print the table of `--estimates`."""
    directory = RunDir(run.absolute())
    specs, index = load_specs(directory), load_database(directory.artifacts)
    config = replace(RunConfig.from_json(read_json(directory.config_path)), targets=())
    levels, names = plan_levels(specs, config).levels, tuple(index.candidates)
    fine = QuantType("Q8_0")
    nats = {
        c.tensor: c.nats or c.error for n in names for c in index.candidates[n] if c.qtype == fine
    }
    error = {q: squared_error(q) for q in levels}

    def candidates(name: str) -> tuple[Candidate, ...]:
        spec, own = specs[name], specs[name].qtype
        made = [
            (q, int(spec.n_elements * q.bpw / 8), nats[name] * error[q] / error[fine])
            for q in levels
        ]
        rows = [*made, (own, spec.n_bytes(), 0.0)]
        return tuple(Candidate(name, q, "", "", 0, n_bytes, kl, kl) for q, n_bytes, kl in rows)

    table_of = tuple(candidates(name) for name in names)
    slots = tuple(tuple(c.n_bytes for c in row) for row in table_of)
    n_weights = sum(specs[name].n_elements for name in names)
    uniform = {q: int(n_weights * q.bpw / 8) for q in levels}
    print({str(q): round(error[q] / error[fine]) for q in levels}, flush=True)
    rows = []
    for bpw in bpws:
        limit, first = int(bpw * n_weights / 8), [0.0, 0.0]
        known: set[tuple[QuantType, ...]] = set()
        for rule._LEAST, rule._MOST in RANGES:
            left = rule.wanted(uniform, [limit], replace(config, levels=None))
            if left in known:
                continue
            kept = [
                [k for k, c in enumerate(r) if c.qtype not in set(levels) - {*left}]
                for r in table_of
            ]
            part = pruned(keeping(SearchSpace(names, table_of, slots, 0, limit), kept))
            plain = estimated_costs(part)
            found = [(costs, knapsack(part, costs)) for costs in (plain, costs_after(part, plain))]
            kl = [sum(c[k] for c, k in zip(*one, strict=True)) for one in found]
            first = first if known else kl
            known.add(left)
            disk = sum(uniform[q] for q in left) / (2 * n_weights)
            types = ", ".join(f"{n} {q}" for q, n in types_of(part, found[1][1]).items())
            said = f"{bpw:g} bpw, {rule._LEAST:g} to {rule._MOST:g}", ", ".join(map(str, left))
            ratios = (f"{a / b:.3f}" for a, b in zip(kl, first, strict=True))
            rows.append([*said, *ratios, f"{disk:.2f}x", types])
    print(table(["range", "levels", "KL to all", "tuned", "of the base", "types, tuned"], rows))


def types_of(space: SearchSpace, choices: Choices) -> Mapping[str, int]:
    rows = zip(space.candidates, choices.tolist(), strict=True)
    return Counter(str(row[k].qtype) for row, k in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--bpw", default="3.5,4.7,6")
    parser.add_argument("--tokens", type=int, default=262_144, help="of every search")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--codebooks", action="store_true", help="vary their least bytes")
    parser.add_argument("--estimates", action="store_true", help="of the run's database alone")
    given = parser.parse_args()
    if given.estimates:
        return estimated(given.run, list(map(float, given.bpw.split(","))))
    directory = RunDir(given.run.absolute())
    base = load_base(directory)
    config = replace(RunConfig.from_json(read_json(directory.config_path)), targets=())
    plan = plan_levels(load_specs(directory), config)
    uniform = {level: data_bytes(base, plan.uniform(level)) for level in plan.levels}
    judge, space = judge_of(given.run, given.device, prune=False)
    rows = []
    least, most, codebooks = rule._LEAST, rule._MOST, rule._LEAST_OF_CODEBOOKS
    ranges = [(a, b, codebooks) for a, b in RANGES[1:]]
    if given.codebooks:
        ranges = [(least, most, n) for n in CODEBOOKS]
    ranges.insert(0, (0.0, math.inf, 0.0))
    for bpw in map(float, given.bpw.split(",")):
        limit = int(bpw * base.n_elements / 8)
        known: dict[tuple[QuantType, ...], str] = {}
        first = math.nan
        for bounds in ranges:
            rule._LEAST, rule._MOST, rule._LEAST_OF_CODEBOOKS = bounds
            levels = rule.wanted(uniform, [limit], replace(config, levels=None))
            name = f"{bpw:g} bpw, {bounds[0]:g} to {bounds[1]:g}, codebooks from {bounds[2]:g}"
            said = ", ".join(map(str, levels))
            if levels in known:
                rows.append([name, said, "as " + known[levels], "", "", ""])
                continue
            known[levels] = name
            part = replace(narrowed(space, plan, levels), limit_bytes=limit)
            narrow, found = Narrow(judge, space, part), []
            for seed in range(given.seeds):
                *_, last = ours(narrow, part, given.tokens, seed)
                found.append(narrow.last_word(last.choices))
            kl, n_bytes = float(np.mean(found)), sum(uniform[level] for level in levels)
            first = kl if math.isnan(first) else first
            disk = f"{n_bytes / base.path.stat().st_size:.2f}x"
            types = ", ".join(f"{n} {q}" for q, n in types_of(part, last.choices).items())
            rows.append([name, said, f"{kl:.5f}", f"{kl / first:.3f}", disk, types])
            print(*rows[-1], sep=" | ", flush=True)
    print(table(["range", "levels", "KL", "to all", "disk", "types"], rows))


if __name__ == "__main__":
    main()
