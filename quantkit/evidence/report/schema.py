"""The contents of a report as frozen dataclasses, read from `report.json` (see docs/report.md).

Everything that is drawn or written from a report goes through `read`, so that a file of another
version or with a hole in it is one plain sentence, wherever it is met.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.run.check import Check
from quantkit.tensors import Fallback

SCHEMA = 3

OURS, STOCK, UNIFORM, GIVEN = "ours", "stock", "uniform", "given"
KINDS = (OURS, STOCK, UNIFORM, GIVEN)


@dataclass(frozen=True)
class Mean:
    """A measured value. `stderr` counts tokens as independent; `low` and `high` are the 95 %
    interval with windows as the unit, None where there is none.
    """

    value: float
    stderr: float
    low: float | None = None
    high: float | None = None

    @property
    def is_known(self) -> bool:
        """False for what could not be measured."""
        return not math.isnan(self.value)


_UNKNOWN = Mean(math.nan, math.nan)


@dataclass(frozen=True)
class Tail:
    """Where the tokens' KL lies, and ln(perplexity / the base's)."""

    median: float
    p99: float
    p999: float
    largest: float
    ln_ppl_ratio: Mean


@dataclass(frozen=True)
class Versus:
    """A paired test on the same windows: this row less an output; above zero, worse."""

    difference: float
    p_value: float
    significant: bool
    n_windows: int


@dataclass(frozen=True)
class Tests:
    """The paired tests of a row against one output; None where there are too few windows."""

    kl: Versus | None = None
    weight_kl: Versus | None = None


@dataclass(frozen=True)
class TracePoint:
    """The search's best KL after `tokens` evaluated tokens."""

    generation: int
    tokens: int
    kl: float
    stderr: float


@dataclass(frozen=True)
class Speed:
    """Tokens per second, seconds to load, and bytes of memory with a context of `n_ctx`."""

    prompt: float
    generation: float
    load_seconds: float
    peak_bytes: int
    n_ctx: int


@dataclass(frozen=True)
class Task:
    """One zero-shot task: accuracy, the base's, and how many answers differ from the base's."""

    name: str
    value: float
    stderr: float
    n: int
    base: float | None
    n_flips: int | None


@dataclass(frozen=True)
class Tensor:
    """How one tensor is stored. `method` is empty where it is not known."""

    name: str
    qtype: str
    n_elements: int
    n_bytes: int
    method: str


@dataclass(frozen=True)
class Row:
    """One measured file. `kind` is one of KINDS; KL in nats by domain and over all of them. Of an
    output what could not be measured is not a number.
    """

    kind: str
    name: str
    n_bytes: int
    bpw: float
    kl: Mean
    top1: float
    perplexity: Mean
    domains: dict[str, Mean]
    tail: Tail | None
    weight_kl: Mean | None
    long: dict[int, Mean]  # KL in contexts of so many tokens
    versus: dict[str, Tests]  # by the output's name
    speed: Speed | None
    tasks: tuple[Task, ...]
    tasks_not_run: str  # the reason, where there are no tasks
    sha256: str
    tensors: tuple[Tensor, ...]
    target: str = ""  # what an output was asked to be
    checks: tuple[Check, ...] = ()
    trace: tuple[TracePoint, ...] = ()
    generation: dict[str, str] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """The name without options' dashes."""
        return self.name.replace(" --pure", " pure")

    @property
    def label(self) -> str:
        """The name with where the file comes from."""
        if self.kind == STOCK:
            return f"llama.cpp {self.short}"
        return f"uniform {self.name}, our weights" if self.kind == UNIFORM else self.name


@dataclass(frozen=True)
class Base:
    """The full-precision file that everything is compared with."""

    n_bytes: int
    n_parameters: int
    perplexity: Mean
    speed: Speed | None


@dataclass(frozen=True)
class Report:
    """A whole report. `rows` begins with the outputs: the files that it is about."""

    kind: str  # run or compare
    model: str
    base: Base
    rows: tuple[Row, ...]
    n_outputs: int
    protocol: str
    texts: tuple[str, ...]
    calibration_note: str
    refused: tuple[str, ...] = ()  # sizes that were asked for and cannot be made: the reasons
    not_measured: tuple[tuple[str, str], ...] = ()  # name, reason
    fallbacks: tuple[Fallback, ...] = ()
    unmapped: tuple[str, ...] = ()
    languages: dict[str, float] = field(default_factory=dict)  # by code: the base's bits, English 1
    versions: dict[str, str] = field(default_factory=dict)
    weight_windows: int | None = None
    n_windows: int | None = None

    @property
    def outputs(self) -> tuple[Row, ...]:
        return self.rows[: self.n_outputs]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def others(self) -> tuple[Row, ...]:
        return self.rows[self.n_outputs :]

    @property
    def by_size(self) -> tuple[Row, ...]:
        return tuple(sorted(self.rows, key=lambda row: row.n_bytes))

    def numbered(self, name: str, output: Row) -> str:
        """Return the name of something that every output has: with several outputs it ends with the
        output's number, counted from 1.
        """
        return name if self.n_outputs == 1 else f"{name}-{1 + self.outputs.index(output)}"

    def about(self, output: Row) -> Report:
        """Return the report of one output and of everything that it is compared with."""
        return replace(self, rows=(output, *self.others), n_outputs=1)

    def tests(self, row: Row) -> Tests:
        """Return the tests of a row against the output that is nearest to it in size; empty for an
        output.
        """
        nearest = min(self.outputs, key=lambda output: abs(output.n_bytes - row.n_bytes))
        return row.versus.get(nearest.name, Tests())


def read(value: Mapping[str, Any]) -> Report:
    """Read a report from the JSON of `report.json`. Raises QuantkitError when it has another
    version or lacks something.
    """
    schema = value.get("schema") if isinstance(value, Mapping) else None
    if schema != SCHEMA:
        raise QuantkitError(
            f"This report has schema {schema}, not {SCHEMA}.",
            "Run `quantkit resume` on its folder with the quantkit that made it, or make it again.",
        )
    try:
        return _report(value)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise QuantkitError(
            f"The report cannot be read ({type(error).__name__}: {error}).",
            "docs/report.md says what a report holds.",
        ) from None


def _report(value: Mapping[str, Any]) -> Report:
    base = value["base"]
    rows = tuple(_row(row) for row in [*value["outputs"], *value["baselines"]])
    if not value["outputs"] or base["n_parameters"] < 1:
        raise ValueError("no output, or a base without parameters")
    return Report(
        kind=str(value.get("kind", "run")),
        model=str(value["model"]),
        base=Base(
            int(base["n_bytes"]),
            int(base["n_parameters"]),
            _mean(base["perplexity"], "value"),
            _speed(base.get("speed")),
        ),
        rows=rows,
        n_outputs=len(value["outputs"]),
        protocol=str(value["protocol"]),
        texts=tuple(str(name) for name in value["texts"]),
        calibration_note=str((value.get("calibration") or {}).get("note", "")),
        refused=tuple(f"{row['target']}: {row['refusal']}" for row in value.get("refused", ())),
        not_measured=tuple(
            (str(row["name"]), str(row["reason"])) for row in value.get("not_measured", ())
        ),
        fallbacks=tuple(
            Fallback(str(f["tensor"]), str(f["asked"]), str(f["used"]), str(f["reason"]))
            for f in value.get("fallbacks", ())
        ),
        unmapped=tuple(str(name) for name in value.get("unmapped", ())),
        languages={
            str(code): float(bits)
            for code, bits in ((value.get("calibration") or {}).get("languages") or {}).items()
        },
        versions={str(k): str(v) for k, v in (value.get("versions") or {}).items()},
        n_windows=value.get("n_windows"),
        weight_windows=value.get("weight_windows"),
    )


def _row(row: Mapping[str, Any]) -> Row:
    tasks = row.get("tasks") or {}
    if row["kind"] not in KINDS:
        raise ValueError(f"a row of kind {row['kind']!r}")
    return Row(
        kind=str(row["kind"]),
        name=str(row["name"]),
        n_bytes=int(row["n_bytes"]),
        bpw=float(row["bpw"]),
        kl=_mean(row["kl"], "mean"),
        top1=math.nan if row["top1"] is None else float(row["top1"]),
        perplexity=_mean(row["perplexity"], "value"),
        domains={str(name): _mean(d["kl"], "mean") for name, d in row["domains"].items()},
        tail=_tail(row),
        weight_kl=_mean(row["weight_kl"], "mean") if row.get("weight_kl") else None,
        versus={
            str(name): Tests(_versus(tests.get("kl")), _versus(tests.get("weight_kl")))
            for name, tests in (row.get("versus") or {}).items()
        },
        long={int(n): _mean(kl, "mean") for n, kl in (row.get("long") or {}).items()},
        speed=_speed(row.get("speed")),
        tasks=tuple(_task(name, task) for name, task in tasks.items()),
        tasks_not_run=str((row.get("zero_shot") or {}).get("reason", "")),
        sha256=str(row.get("sha256", "")),
        tensors=tuple(
            Tensor(
                str(name),
                str(t["qtype"]),
                int(t["n_elements"]),
                int(t["n_bytes"]),
                str(t.get("method", "")),
            )
            for name, t in (row.get("tensors") or {}).items()
        ),
        target=str((row.get("search") or {}).get("target", "")),
        checks=tuple(
            Check(str(c["name"]), c["passed"], str(c["about"])) for c in row.get("integrity", ())
        ),
        trace=tuple(
            TracePoint(int(p["generation"]), int(p["tokens"]), float(p["kl"]), float(p["stderr"]))
            for p in row.get("trace", ())
        ),
        generation={str(k): str(v) for k, v in (row.get("generation") or {}).items()},
    )


def _mean(value: Mapping[str, Any] | None, key: str) -> Mean:
    if value is None:
        return _UNKNOWN
    low, high = value.get("ci95") or (None, None)
    return Mean(float(value[key]), float(value["stderr"]), low, high)


def _tail(row: Mapping[str, Any]) -> Tail | None:
    kl, ratio = row["kl"], row.get("ln_ppl_ratio")
    if kl is None or ratio is None or "median" not in kl:
        return None
    return Tail(
        float(kl["median"]),
        float(kl["p99"]),
        float(kl["p999"]),
        float(kl["max"]),
        _mean(ratio, "mean"),
    )


def _versus(test: Mapping[str, Any] | None) -> Versus | None:
    if not test:
        return None
    return Versus(
        float(test["difference"]),
        float(test["p_value"]),
        bool(test["significant"]),
        int(test["n_windows"]),
    )


def _speed(value: Mapping[str, Any] | None) -> Speed | None:
    if not value:
        return None
    return Speed(
        float(value["prompt"]["tokens_per_second"]),
        float(value["generation"]["tokens_per_second"]),
        float(value["load_seconds"]),
        int(value["peak_rss_bytes"]),
        int(value["n_ctx"]),
    )


def _task(name: str, task: Mapping[str, Any]) -> Task:
    """By acc_norm where the task has it and its paper reports it; here always by acc."""
    base, flips = task.get("base"), task.get("flips")
    return Task(
        str(name),
        float(task["acc"]["value"]),
        float(task["acc"]["stderr"]),
        int(task["acc"]["n"]),
        float(base["acc"]["value"]) if base else None,
        int(flips["acc"]["n"]) if flips else None,
    )
