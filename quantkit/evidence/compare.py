"""Compare any GGUFs of the same model: the same report, for files made elsewhere.

`evaluators.compare` measures, every file open in a sandboxed process; here its JSON becomes a
report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from evaluators.figures import Divergence, OnDocuments, PairedTest, Perplexity, SpeedResult
from quantkit.errors import QuantkitError
from quantkit.evidence.report import Report, Row, write_report
from quantkit.evidence.report.schema import (
    GIVEN,
    Base,
    Documents,
    Missing,
    Output,
    Tensor,
    Tests,
)
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.hub import given
from quantkit.llamacpp import place
from quantkit.sandbox import untrusted
from quantkit.tensors import to_json


@dataclass(frozen=True)
class _Base:
    n_bytes: int
    perplexity: Perplexity
    speed: SpeedResult | None = None
    device_kl: Divergence | None = None
    floor: dict[str, OnDocuments] | None = None


@dataclass(frozen=True, kw_only=True)
class _File(Row):
    """A row before it has a name."""

    kind: str = GIVEN
    name: str = ""
    bpw: float = math.nan
    versus_first: PairedTest | None = None
    nll_versus_first: PairedTest | None = None
    weight_versus_first: PairedTest | None = None


@dataclass(frozen=True)
class _Settings:
    protocol: str
    n_ctx: int
    n_windows: int
    texts: dict[str, str]
    device: str
    llama_cpp_python: str


@dataclass(frozen=True)
class Measured:
    """What the evaluators' command answers."""

    base: _Base
    files: tuple[_File, ...]
    settings: _Settings
    documents: Documents | None = None


def compare(base: str, files: Sequence[str], options: Sequence[str], out: Path) -> Report:
    """Measure `files` against `base` and write the report into `out`.

    Args:
        base: the full-precision GGUF; like the others a path or hf://owner/name/file.gguf.
        files: at least one.
        options: handed to evaluators.compare as they are, such as --text FILE.

    Raises:
        UsageError: a file that is not there.
        QuantkitError: a broken file, or whatever the evaluators say; nothing is written then.
    """
    base_path, *paths = [given.locate(name) for name in (base, *files)]
    for path in (base_path, *paths):
        check_sound(GgufFile(path))
    measured = _measure(base_path, paths, options)
    report = to_report(measured, base_path, paths, given.short_names(files))
    out.mkdir(parents=True, exist_ok=True)
    write_report(out, report)
    return report


def _measure(base: Path, files: Sequence[Path], options: Sequence[str]) -> Measured:
    """Progress goes to stderr."""
    from evaluators import compare as evaluated
    from evaluators.errors import EvaluationError

    arguments = ["--base", str(base), *options, "--", *(str(file) for file in files)]
    try:
        answer = evaluated.answer(arguments, place.sandboxed)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from error
    return untrusted.build(Measured, to_json(answer))


def to_report(
    measured: Measured, base: Path, files: Sequence[Path], names: Sequence[str]
) -> Report:
    """Return the report (kind compare) of what was measured; `names` are what the files are called
    there.
    """
    opened = GgufFile(base)
    settings = measured.settings
    first, *others = (
        _row(file, name, opened.n_elements, names[0])
        for file, name in zip(measured.files, names, strict=True)
    )
    output = Output(
        **vars(first),
        tensors=_tensors(GgufFile(files[0])),
        zero_shot=None if first.tasks else {"status": "not run", "reason": "no --task"},
    )
    return Report(
        kind="compare",
        model=str(opened.metadata.get("general.name") or base.stem),
        base=Base(
            path=base.name,
            n_bytes=measured.base.n_bytes,
            n_parameters=opened.n_elements,
            perplexity=measured.base.perplexity,
            speed=_nameless(measured.base.speed),
            device_kl=measured.base.device_kl,
            floor=measured.base.floor,
        ),
        documents=measured.documents,
        outputs=(output,),
        baselines=tuple(sorted(others, key=lambda row: row.n_bytes)),
        protocol=f"{settings.protocol}'s windows of {settings.n_ctx} tokens, second half"
        " scored, KL(base || file) in nats",
        n_windows=settings.n_windows,
        device=settings.device,
        texts=settings.texts,
        versions={"llama-cpp-python": settings.llama_cpp_python},
        not_measured=_not_asked_for(first) or None,
    )


def _not_asked_for(first: Row) -> tuple[Missing, ...]:
    """What a run's report has, and this one has only when it is asked for."""
    asked = {
        "KL in conversations": (first.conversations, "--conversations"),
        "answers beside the original's": (first.answers, "--answers"),
    }
    return tuple(
        Missing(name, f"{option} was not given")
        for name, (found, option) in asked.items()
        if found is None
    )


def _row(file: _File, name: str, n_parameters: int, first: str) -> Row:
    tests = Tests(file.versus_first, file.nll_versus_first, file.weight_versus_first)
    own = Row(**{f.name: getattr(file, f.name) for f in fields(Row)})
    return replace(
        own,
        name=name,
        bpw=8 * file.n_bytes / n_parameters,
        versus=None if tests == Tests() else {first: tests},
        speed=_nameless(file.speed),
    )


def _nameless(speed: SpeedResult | None) -> SpeedResult | None:
    """Without the file, whose folder is nobody's business."""
    return speed and replace(speed, file=None)


def _tensors(file: GgufFile) -> dict[str, Tensor]:
    """The matrices of a file: what each is stored as."""
    return {
        t.name: Tensor(qtype=str(t.qtype), n_elements=math.prod(t.shape), n_bytes=t.n_bytes)
        for t in file.tensors.values()
        if len(t.shape) > 1
    }
