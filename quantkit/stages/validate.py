"""validate: the real files in llama.cpp, against the full-precision base and llama.cpp's own files.

KL divergence of the files and of their weights alone, perplexity, top-1 agreement, zero-shot
answers, speed and memory, on text that no earlier stage has seen. Beside the output stand stock
files made here with the same imatrix, the uniform files of our own levels, and whatever the user
names; each is tested against the output, window by window. Before that the file must be what it
should be (`evidence.integrity`). Writes `report.json`, `report.md`, `report.html` and `plots/`, and
`receipt.json`, by which anybody can measure it again.
It measures with `evaluators`, which the search never looks at: it does not grade itself.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import hub
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.errors import QuantkitError
from quantkit.evidence import baselines, devices, integrity
from quantkit.evidence.baselines import Baseline, as_it_is
from quantkit.evidence.in_use import InUse
from quantkit.evidence.meter import Meter
from quantkit.evidence.receipt import write as write_receipt
from quantkit.evidence.receipt.make import LONG, of_run
from quantkit.evidence.report import Report, Row, write_report
from quantkit.evidence.report import schema as reported
from quantkit.evidence.report.measures import Measures, reason_of
from quantkit.evidence.report.schema import (
    NO_PERPLEXITY,
    OURS,
    Base,
    Calibration,
    Search,
    Tensor,
    TracePoint,
    to_json,
)
from quantkit.evidence.report.text import without_folders
from quantkit.evidence.room import make_room
from quantkit.files import sha256_file
from quantkit.gguf_file.base import load_base, load_original
from quantkit.gguf_file.imatrix import read_imatrix
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.place import weights_room
from quantkit.run.check import Check, load_checks
from quantkit.run.folder import read_as, read_json
from quantkit.run.outputs import Budgets, Output, load_outputs
from quantkit.run.provenance import code_version
from quantkit.run.recipe import Recipe
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.sandbox.untrusted import build, typed
from quantkit.sources.snapshot import load_quantized, load_snapshot
from quantkit.tensors import CarriedOver, Fallback

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.choice_items import TaskItems
    from evaluators.figures import Divergence
    from evaluators.llama_runtime import Runtime
    from evaluators.overlap import Seen

NAME = "validate"

N_CTX = 512
_PROMPT = "Name three things that float on water."
_PACKAGES = "llama-cpp-python torch transformers gguf huggingface_hub datasets numpy".split()


class Validate(Stage):
    """Compare it with the original and llama.cpp's own files."""

    name = NAME
    version = 7
    fields = ("eval_text", "tasks", "compare")
    takes_long = True

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError when the file is not what was stitched or does not load. A measure
        that cannot be taken is left out, and the report says why.
        """
        from evaluators.errors import EvaluationError

        try:
            return _validate(run)
        except EvaluationError as error:  # its remedy may name an option of the evaluators' own
            raise QuantkitError(
                error.message, "" if "--" in error.remedy else error.remedy
            ) from error

    def extra_inputs(self, config: RunConfig) -> dict[str, str]:
        """Return the contents of the files that the config names."""
        named = {"eval_text": config.eval_text, "tasks": config.tasks}
        named |= {f"compare {name}": name for name in config.compare}
        return {
            f"{k}_sha256": sha256_file(Path(v)) for k, v in named.items() if v and Path(v).is_file()
        }


def _validate(run: Run) -> StageResult:
    from evaluators.base_logits import BaseLogits

    measures = Measures(lambda said: run.events.emit(NAME, "note", said))
    base, stitched = load_original(run.dir), run.artifacts.stitched
    outputs = load_outputs(run.dir).outputs
    make_room(run, base, outputs)
    texts, device = _texts(run), devices.choose(run.config.device, base)
    runtime = device.runtime
    if device.reason:
        run.events.emit(NAME, "note", f"measuring on {device.name}: {device.reason}")
    text = next(iter(texts.values()))
    checks = {o.file: _checks(run, stitched / o.file, text, runtime) for o in outputs}
    ours = [
        Baseline(OURS, o.file, partial(as_it_is, stitched / o.file), is_rival=True) for o in outputs
    ]
    others = measures.take("files beside ours", lambda: _baselines(run, base, outputs)) or []
    items, reason = measures.take("zero-shot items", lambda: _items(run)) or (None, "see below")
    n_steps = 2 + sum(4 if file.is_rival else 3 for file in (*ours, *others))
    seen = _calibrated(run)
    meter = Meter(run, base, device, items, measures, n_steps, seen)
    folder = run.artifacts.folder(NAME)
    for left in folder.glob("weight-kl-*"):  # of a run that was killed
        shutil.rmtree(left)
    kept = folder / "base-logits"  # some GB; taken up again after a kill
    with ExitStack() as stack:

        def predictions(texts: Mapping[str, str], n_ctx: int, *more: Any) -> BaseLogits:
            made = BaseLogits.compute(base.path, texts, n_ctx, *more)
            return stack.enter_context(made)

        progress = meter.step("the base's predictions")
        windows = run.profile.eval_windows
        logits = measures.take(
            "KL and perplexity",
            lambda: predictions(texts, N_CTX, windows, kept, runtime, progress),
        )
        if logits is not None:
            meter.claims.add_tokens(logits)
        joined = {LONG: "\n\n".join(texts.values())}
        for n_ctx in run.profile.effort.long:

            def long(n_ctx: int = n_ctx) -> BaseLogits:
                _check_trained(base, n_ctx)
                return predictions(joined, n_ctx, 1, kept, runtime)

            known = measures.take(f"KL in a context of {n_ctx:,} tokens", long)
            if known is not None:
                meter.long[n_ctx] = known
                meter.claims.add_tokens(known)
        meter.in_use = InUse(
            base.path, run.profile.effort, runtime, measures, kept, stack, seen, meter.claims
        )
        meter.in_use.ask_original(meter.step("the original's answers"))
        measured = {file.name: meter.ours(logits, file) for file in ours}
        on_base = meter.device_kl(logits, "full precision", base.path)
        rows = [row for other in others if (row := meter.beside(logits, other))]
    shutil.rmtree(kept, ignore_errors=True)
    found = tuple(_output(run, o, measured[o.file], checks[o.file], reason) for o in outputs)
    beside = tuple(sorted(rows, key=lambda row: row.n_bytes))
    report = _report(run, base, texts, meter, on_base, found, beside)
    files = [
        {"name": row.name, "n_bytes": row.n_bytes, "top1": row.top1, "kl": row.kl.mean}
        for row in report.outputs
    ]
    written = write_report(folder, report, measures)
    receipt = of_run(run, report, meter.claims, device.engine())
    written.append(write_receipt(run.artifacts.receipt, receipt))
    return StageResult(written, {"files": to_json(files)})


def _check_trained(base: GgufFile, n_ctx: int) -> None:
    """Raises QuantkitError for a context that is longer than the model was trained for."""
    if n_ctx > base.context_length:
        raise QuantkitError(f"The model was trained for {base.context_length:,} tokens.", "")


# ---- integrity


@dataclass(frozen=True)
class _Checks:
    found: list[Check]
    generation: dict[str, str]


def _checks(run: Run, ours: Path, text: str, runtime: Runtime) -> _Checks:
    """All integrity checks. Raises QuantkitError when weights or metadata are not what they should
    be; what else fails is an event and stands in the report.
    """
    from evaluators import generation

    effort = run.profile.effort
    file = GgufFile(ours)
    base = load_base(run.dir)
    found = [integrity.same_weights(file, effort.rows), integrity.same_frame(file, base)]
    for check in found:
        if not check.passed:
            raise QuantkitError(
                f"{ours.name} is not what was stitched: {check.about}.",
                "This is a bug: please report it.",
            )
    found += load_checks(run.dir)
    found += _logit_checks(run, file, text, runtime)
    said: dict[str, str] = {}

    def chat() -> Check:
        said.update(generation.answer(ours, _PROMPT, n_tokens=48, runtime=runtime))
        return integrity.chat_check(said)

    found.append(_judged("chat turn", chat))
    for check in found:
        if not check.passed:
            word = "not run" if check.passed is None else "FAILED"
            run.events.emit(NAME, "note", f"{check.name}: {word}: {check.about}")
    return _Checks(found, said)


def _logit_checks(run: Run, file: GgufFile, text: str, runtime: Runtime) -> list[Check]:
    """PyTorch with the file's weights against llama.cpp, at F16 and on the file itself."""
    from evaluators import agreement
    from evaluators.weights import at_f16
    from quantkit.machine.memory import free_memory
    from quantkit.model.row_maps import load_row_maps

    names = ("logits at F16 against PyTorch's", "logits of the file against PyTorch's")
    maps = load_row_maps(run.artifacts.row_maps)
    folder = load_quantized(run.dir).folder
    try:
        ids = agreement.tokens_of(file.path, text, N_CTX, runtime)
        logits = integrity.torch_logits(folder, maps, file, ids, run.config.device)
        devices.release(run.config.device)
    except Exception as error:
        return [_not_made(name, error) for name in names]

    def expanded() -> Check:
        memory = weights_room(free_memory())
        with at_f16(file.path, run.artifacts.folder(NAME), runtime, memory) as model:
            found, _ = agreement.compare_model(model, ids, logits)
        return integrity.logits_check(names[0], file, found, integrity.F16_LIMIT)

    def as_it_is() -> Check:
        found = agreement.measure(file.path, ids, logits, runtime)
        return integrity.logits_check(names[1], file, found, integrity.FILE_LIMIT)

    return [_judged(names[0], expanded), _judged(names[1], as_it_is)]


def _judged(name: str, make: Callable[[], Check]) -> Check:
    """A check. One that cannot be made has failed, and says why."""
    try:
        return make()
    except Exception as error:
        return _not_made(name, error)


def _not_made(name: str, error: Exception) -> Check:
    return Check(name, False, f"not compared: {without_folders(reason_of(error)).rstrip('.')}")


def _baselines(run: Run, base: GgufFile, outputs: Sequence[Output]) -> list[Baseline]:
    """Stock files around our sizes, our own uniform files around them, and what the user named."""
    imatrix = read_imatrix(run.artifacts.imatrix)
    effort = run.profile.effort
    like = {str(t): t.mix for t in run.config.targets if t.mix}
    sizes = {o.n_bytes: like.get(o.budget.target) for o in outputs}
    uniform = baselines.uniform_baselines(run.artifacts.levels, list(sizes), effort.n_uniform)
    if effort.n_uniform and not uniform:
        run.events.emit(NAME, "note", "the uniform files were deleted, so they are not measured")
    return [
        *baselines.stock_baselines(
            base, sizes, effort.n_below, imatrix, run.artifacts.folder(NAME)
        ),
        *uniform,
        *baselines.given_baselines(run.config.compare),
    ]


# ---- what it is measured with


def _texts(run: Run) -> dict[str, str]:
    """Evaluation text by domain: the given file, or the held-out tenth of every calibration
    domain.
    """
    if run.config.eval_text:
        path = Path(run.config.eval_text)
        try:
            return {path.stem: path.read_bytes().decode("utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise QuantkitError(
                f"The evaluation text {path} cannot be read ({error}).", "Give a UTF-8 text file."
            ) from None
    folder = run.artifacts.eval_texts
    return {path.stem: path.read_bytes().decode("utf-8") for path in sorted(folder.glob("*.txt"))}


def _calibrated(run: Run) -> Seen:
    """The text that earlier stages saw, which nothing may have in common that is measured on."""
    from evaluators.overlap import Seen

    return Seen([run.artifacts.calibrated.read_text("utf-8")])


def _items(run: Run) -> tuple[TaskItems | None, str]:
    """The zero-shot items, or the reason why there are none."""
    from evaluators import choice_items
    from evaluators.errors import EvaluationError

    n_items = run.profile.effort.n_items
    if run.config.tasks:
        return choice_items.load("choices", data=Path(run.config.tasks)), ""
    if run.config.model == DEMO_MODEL:
        return choice_items.load("everyday", limit=n_items), ""
    reason = hub.why_offline(hub.resolve_token())
    if reason:
        return None, f"no tasks were given, and {reason}"
    try:
        return choice_items.load("piqa", limit=n_items), ""
    except EvaluationError as error:  # a data set that nobody asked for fails no run
        return None, f"PIQA could not be loaded: {error.message.rstrip('.')}"


# ---- the report


def _report(
    run: Run,
    base: GgufFile,
    texts: Mapping[str, str],
    meter: Meter,
    on_base: Divergence | None,
    outputs: tuple[reported.Output, ...],
    baselines: tuple[Row, ...],
) -> Report:
    from evaluators.texts import text_sha256

    first = meter.first.combined if meter.first else None
    info, converted = load_snapshot(run.dir).info, read_json(run.artifacts.specs)
    speed = meter.measures.take("speed of the base", lambda: meter.speed(base.path))
    return Report(
        kind="run",
        model=info.id,
        revision=info.sha,
        base=Base(
            path=str(base.path.relative_to(run.dir.path)),
            n_bytes=base.n_bytes,
            sha256=run.records["convert"].outputs[0].sha256,
            n_parameters=base.n_elements,
            perplexity=first.base_perplexity if first else NO_PERPLEXITY,
            speed=speed,
            device_kl=on_base,
            floor=meter.in_use.floor if meter.in_use else None,
        ),
        protocol=f"llama.cpp's windows of {N_CTX} tokens, second half scored,"
        " KL(base || file) in nats",
        n_windows=first.n_windows if first else None,
        weight_windows=meter.n_weight_windows,
        device=meter.device.name,
        device_reason=meter.device.reason,
        texts={name: text_sha256(text) for name, text in texts.items()},
        overlap={name: meter.seen.overlap(text) for name, text in texts.items()},
        documents=meter.in_use.documents if meter.in_use else None,
        calibration=build(Calibration, read_json(run.artifacts.calibration)),
        refused=read_as(Budgets, run.artifacts.budgets).refused + load_outputs(run.dir).left_out,
        fallbacks=(
            *typed(tuple[Fallback, ...], converted["not_carried"]),
            *typed(tuple[Fallback, ...], read_json(run.artifacts.errors)["fallbacks"]),
        ),
        carried=typed(tuple[CarriedOver, ...], converted["carried"]) or None,
        unmapped=typed(tuple[str, ...], run.records["convert"].summary["unmapped"]),
        versions=_versions(),
        outputs=outputs,
        baselines=baselines,
        not_measured=tuple(meter.measures.missing),
    )


def _output(run: Run, output: Output, row: Row, checks: _Checks, not_asked: str) -> reported.Output:
    """What was measured of an output, how it came to be, and how every quantizable tensor of it is
    stored. `not_asked`: why there are no zero-shot answers.
    """
    path = run.artifacts.stitched / output.file
    name = str(path.relative_to(run.dir.path))
    limit_bytes = output.budget.limit_bytes
    found = run.artifacts.answer(limit_bytes)
    tuned = read_json(run.artifacts.tuning)["budgets"].get(str(limit_bytes))
    recipe = Recipe.load(run.artifacts.stitched / output.recipe)
    tensors = GgufFile(path).tensors
    trace = found / "trace.jsonl"
    lines = trace.read_text("utf-8").splitlines() if trace.exists() else []  # nothing was searched
    return reported.Output(
        **vars(row),
        path=name,
        sha256=next(o.sha256 for o in run.records["stitch"].outputs if o.path == name),
        parts=recipe.output.parts or None,
        label=output.label,
        search=build(Search, {**read_json(found / "budget.json"), "tuning": tuned}),
        trace=tuple(build(TracePoint, json.loads(line)) for line in lines if line),
        tensors={
            name: Tensor(
                qtype=str(tensors[name].qtype),
                method=stored.method,
                n_elements=math.prod(tensors[name].shape),
                n_bytes=tensors[name].n_bytes,
            )
            for name, stored in recipe.tensors.items()
        },
        zero_shot={"status": "not run", "reason": not_asked} if not_asked else {"status": "done"},
        generation=checks.generation,
        integrity=tuple(checks.found),
    )


def _versions() -> dict[str, str]:
    found: Mapping[str, str] = {name: version(name) for name in _PACKAGES}
    return {"quantkit": code_version(), "python": platform.python_version(), **found}
