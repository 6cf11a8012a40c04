"""What a report holds: frozen dataclasses whose fields are those of `report.json`, in its order
(docs/report.md documents it).

They are filled where it is measured, written by `to_json` and read by `read`, so that a file
of another version or with a hole in it is one plain sentence, wherever it is met. What may be
missing has the default None, and is left out where it is; a figure that could not be measured is
not a number here, and null there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from evaluators.figures import (
    Accuracy,
    AnswersBeside,
    Divergence,
    Estimate,
    Flips,
    ItemOverlap,
    Mean,
    MeanNats,
    OnDocuments,
    Overlap,
    PairedTest,
    Perplexity,
    SpeedResult,
)
from quantkit.config.budgets import Budget
from quantkit.errors import QuantkitError
from quantkit.run.check import Check
from quantkit.sandbox import untrusted
from quantkit.search.unspent import Unspent
from quantkit.tensors import CarriedOver, Fallback, FilePart

SCHEMA = 3

OURS, STOCK, UNIFORM, GIVEN = "ours", "stock", "uniform", "given"
KINDS = (OURS, STOCK, UNIFORM, GIVEN)

_NO_KL = Divergence(math.nan, math.nan, None, math.nan, math.nan, math.nan, math.nan, 0)
NO_PERPLEXITY = Perplexity(math.nan, math.nan, None, 0)


@dataclass(frozen=True)
class Figures:
    """What is measured on one text, or on all of them. `top1` is the share of tokens with the
    base's most likely next token.
    """

    kl: Divergence = _NO_KL
    top1: float = math.nan
    top1_stderr: float = math.nan
    perplexity: Perplexity = NO_PERPLEXITY
    ln_ppl_ratio: MeanNats = MeanNats(math.nan, math.nan, None, 0)


@dataclass(frozen=True)
class Tests:
    """The paired tests of a row against one output, above zero where the row is worse; `reason`:
    why there are none.
    """

    kl: PairedTest | None = None
    nll: PairedTest | None = None
    weight_kl: PairedTest | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One zero-shot task; what is the base's, and what differs from it, by `acc` and `acc_norm`."""

    task: str
    n_items: int
    acc: Accuracy
    acc_norm: Accuracy | None = None
    items_sha256: str
    seconds: float
    source: str
    base: dict[str, Accuracy] | None = None
    flips: dict[str, Flips] | None = None
    overlap: ItemOverlap | None = None  # with the text that the output was calibrated on

    @property
    def of_base(self) -> Accuracy | None:
        """The base's accuracy."""
        return (self.base or {}).get("acc")


@dataclass(frozen=True)
class _File:
    kind: str
    name: str
    n_bytes: int
    bpw: float


@dataclass(frozen=True, kw_only=True)
class Row(Figures, _File):
    """One measured file. `kind` is one of KINDS, figures are over all texts. Those of the weights
    alone have a name of their own; `speed`, `tasks` and `long` are of what is looked at closely.
    """

    domains: dict[str, Figures]
    weight_kl: Divergence | None = None
    weight_top1: float | None = None
    weight_domains: dict[str, Divergence] | None = None
    versus: dict[str, Tests] | None = None  # by the output's name
    speed: SpeedResult | None = None
    tasks: dict[str, Task] | None = None
    long: dict[str, Divergence] | None = None  # by the tokens of a context
    device_kl: Divergence | None = None  # KL(CPU || GPU) of this file, when measured on a GPU
    answers: AnswersBeside | None = None  # beside the original's
    conversations: dict[str, OnDocuments] | None = None  # by domain, through the chat template
    weight_conversations: dict[str, Estimate] | None = None  # their mean KL by the weights alone

    @property
    def short(self) -> str:
        """The name without options' dashes."""
        return self.name.replace(" --pure", " pure")

    @property
    def title(self) -> str:
        """The name with where the file comes from."""
        if self.kind == STOCK:
            return f"llama.cpp {self.short}"
        return f"uniform {self.name}, our weights" if self.kind == UNIFORM else self.name


@dataclass(frozen=True)
class Tuning:
    """What tuning came to: KL on held-out text; `reason`: why there was none."""

    steps: int
    reason: str | None = None
    kl_before: float | None = None
    kl_after: float | None = None
    n_tensors: int | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """What an output was asked to be, and what the search came to on its own text; `reason`: why
    nothing was searched.
    """

    target: str
    limit_bytes: int
    n_bytes: int
    smallest_bytes: int | None = None
    largest_bytes: int | None = None
    unspent: Unspent | None = None  # what no tensor can spend of the budget
    searched: bool
    reason: str | None = None
    generations: int | None = None
    tokens: int | None = None
    proposal_kl: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    expects_tuning: bool | None = None
    tuning: Tuning | None = None


@dataclass(frozen=True)
class TracePoint:
    """The search's best KL after `tokens` evaluated tokens."""

    generation: int
    tokens: int
    kl: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """How one tensor is stored."""

    qtype: str
    method: str | None = None
    n_elements: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Output(Row):
    """A file that the report is about, and how it came to be."""

    path: str | None = None
    sha256: str | None = None
    parts: tuple[FilePart, ...] | None = None  # what is published in its place
    label: str | None = None
    search: Search | None = None
    trace: tuple[TracePoint, ...] | None = None
    tensors: dict[str, Tensor] | None = None
    zero_shot: dict[str, str] | None = None
    generation: dict[str, str] | None = None
    integrity: tuple[Check, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """The full-precision file that everything is compared with."""

    path: str | None = None
    n_bytes: int
    sha256: str | None = None
    n_parameters: int
    perplexity: Perplexity = NO_PERPLEXITY
    speed: SpeedResult | None
    device_kl: Divergence | None = None
    floor: dict[str, OnDocuments] | None = None  # of conversations: its own weights at F16


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """One text that the file was calibrated on, and its share; `held_out` is the name of what was
    held out of it to validate on, which may be published if it has a `license`.
    """

    name: str
    source: str
    weight: float
    n_documents: int | None = None
    n_characters: int | None = None
    sha256: str
    license: str | None = None
    held_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the file was calibrated on. `languages` by code: the base's bits, English 1."""

    spec: str | None = None
    note: str
    domains: tuple[CalibrationText, ...] = ()
    languages: dict[str, float] | None = None
    n_tokens: dict[str, int] | None = None
    n_ctx: int | None = None
    n_imatrix_entries: int | None = None
    seed: int | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The conversations that the KL in conversations is over. `asked` is how the turns were
    rendered, chat template or plain text, `reason` why not by the template; `left_out` are domains
    that the model could not be given, with the reason.
    """

    n: int
    n_tokens: int
    n_scored: int
    sha256: str
    asked: str
    reason: str | None = None
    left_out: dict[str, str] | None = None
    overlap: Overlap | None = None  # with the text that was calibrated on


@dataclass(frozen=True)
class Missing:
    """What could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report. `kind` is run or compare, `texts` are sha256 by name; `refused` are sizes
    that were asked for and got no file of their own. `device` is what all figures were measured on,
    `device_reason` why that is not, or not wholly, the GPU that the run was given.
    """

    schema: int = field(default=SCHEMA, init=False)
    kind: str = "run"
    model: str
    revision: str | None = None
    base: Base
    protocol: str
    n_windows: int | None
    weight_windows: int | None = None
    device: str | None = None
    device_reason: str | None = None
    texts: dict[str, str]
    overlap: dict[str, Overlap] | None = None  # of each text with what was calibrated on
    documents: Documents | None = None
    calibration: Calibration | None = None
    refused: tuple[Budget, ...] | None = None
    fallbacks: tuple[Fallback, ...] | None = None
    carried: tuple[CarriedOver, ...] | None = None
    unmapped: tuple[str, ...] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    outputs: tuple[Output, ...]
    baselines: tuple[Row, ...]
    not_measured: tuple[Missing, ...] | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.outputs + self.baselines

    @property
    def first(self) -> Output:
        return self.outputs[0]

    @property
    def by_size(self) -> tuple[Row, ...]:
        return tuple(sorted(self.rows, key=lambda row: row.n_bytes))

    @property
    def calibration_note(self) -> str:
        return self.calibration.note if self.calibration else ""

    def numbered(self, name: str, output: Output) -> str:
        """Return the name of something that every output has: with several outputs it ends with the
        output's number, counted from 1.
        """
        return name if len(self.outputs) == 1 else f"{name}-{1 + self.outputs.index(output)}"

    def about(self, output: Output) -> Report:
        """Return the report of one output and of everything that it is compared with."""
        return replace(self, outputs=(output,))

    def tests(self, row: Row) -> Tests:
        """Return the tests of a row against the output that is nearest to it in size; empty for an
        output.
        """
        nearest = min(self.outputs, key=lambda output: abs(output.n_bytes - row.n_bytes))
        return (row.versus or {}).get(nearest.name, Tests())


def to_json(value: Any) -> Any:
    """Return a report, or a part of one, as JSON types."""
    number = value.value if isinstance(value, Mean | Perplexity) else value
    if isinstance(number, float) and math.isnan(number):
        return None
    if is_dataclass(value):
        there = ((f, getattr(value, f.name)) for f in fields(value))
        return {f.name: to_json(v) for f, v in there if v is not None or f.default is not None}
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def read(value: object) -> Report:
    """Read a report from the JSON of `report.json`. Raises QuantkitError when it has another
    version or lacks something.
    """
    schema = value.get("schema") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or schema != SCHEMA:
        raise QuantkitError(
            f"This report has schema {schema}, not {SCHEMA}.",
            "Run `quantkit resume` on its folder with the quantkit that made it, or make it again.",
        )
    try:
        rows = {name: [_row(row) for row in value[name]] for name in ("outputs", "baselines")}
        base = _known(value["base"])
        base["speed"] = base.get("speed") or None  # {} of earlier comparisons
        report = untrusted.build(Report, {**value, **rows, "base": base})
        if not report.outputs or report.base.n_parameters < 1:
            raise ValueError("no output, or a base without parameters")
        for row in report.rows:
            if row.kind not in KINDS or any(int(n) < 1 for n in row.long or {}):
                raise ValueError(f"a row of kind {row.kind!r}, or a context of no length")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuantkitError(
            f"The report cannot be read ({type(error).__name__}: {error}).",
            "docs/report.md says what a report holds.",
        ) from None
    return report


def _row(value: Mapping[str, Any]) -> dict[str, object]:
    domains = {name: _known(figures) for name, figures in value["domains"].items()}
    return {**_known(value), "domains": domains}


def _known(value: Mapping[str, object]) -> dict[str, object]:
    """What is known of a file: null is the same as not there."""
    return {name: item for name, item in value.items() if item is not None}
