"""validate: the real files in llama.cpp, against the full-precision base and llama.cpp's own files.

KL divergence of the files and of their weights alone, perplexity, top-1 agreement, zero-shot
answers, speed and memory, on text that no earlier stage has seen. Beside the output stand stock
files made here with the same imatrix, the uniform files of our own levels, and whatever the user
names; each is tested against the output, window by window. Before that the file must be what it
should be (`quantkit.integrity`). Writes `report.json`, `report.md`, `report.html` and `plots/`.
Only this stage imports `evaluators`; the search never grades itself.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__, hub, integrity, opponents
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.errors import QuantkitError
from quantkit.ggufio.imatrix import read_imatrix
from quantkit.ggufio.read import GgufFile
from quantkit.opponents import Opponent, as_it_is
from quantkit.report import SCHEMA, write_report
from quantkit.report.schema import OURS, Check
from quantkit.report.text import without_folders
from quantkit.rundir import read_json, sha256_file
from quantkit.stages import StageResult, convert, fetch, stitch
from quantkit.tensors import to_json

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.kl import KLResult
    from evaluators.llama_runtime import Runtime
    from evaluators.tasks.items import TaskItems
    from evaluators.zeroshot import ZeroShotResult
    from quantkit.pipeline import Run

NAME = "validate"
VERSION = 2
FIELDS = ("eval_text", "tasks", "compare")

N_CTX = 512
_PROMPT = "Name three things that float on water."
_PACKAGES = "llama-cpp-python torch transformers gguf huggingface_hub datasets numpy".split()


@dataclass(frozen=True)
class Effort:
    """What a profile spends beside the KL of each file."""

    n_below: int  # stock files of at most our size that are measured: the largest ones
    n_uniform: int  # of our own uniform files: the largest of at most our size, the next larger
    weight_windows: int | None  # of each domain, for the KL of the weights alone; None: all
    rows: int | None  # of each tensor, decoded a second time; None: all
    n_items: int  # zero-shot items
    speed: tuple[int, int, int]  # tokens of prompt and of answer, repeats


EFFORTS = {
    "demo": Effort(3, 0, 2, 32, 60, (128, 32, 2)),
    "fast": Effort(2, 2, 10, None, 200, (256, 32, 2)),
    "standard": Effort(3, 2, None, None, 500, (512, 64, 3)),
    "thorough": Effort(3, 2, None, None, 2000, (512, 64, 3)),
}


def extra_inputs(config: RunConfig) -> dict[str, Any]:
    """The contents of the files that the config names."""
    named = {"eval_text": config.eval_text, "tasks": config.tasks}
    named |= {f"compare {name}": name for name in config.compare}
    return {
        f"{k}_sha256": sha256_file(Path(v)) for k, v in named.items() if v and Path(v).is_file()
    }


def execute(run: Run) -> StageResult:
    """Raises QuantkitError when the file is not what was stitched, does not load, or gives logits
    that are not finite.
    """
    from evaluators.errors import EvaluationError

    try:
        return _validate(run)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from error


def _validate(run: Run) -> StageResult:
    from evaluators.base_logits import BaseLogits

    base = convert.load_base(run.dir)
    ours = run.dir.path / run.records["stitch"].outputs[0].path
    texts = _texts(run)
    runtime = _runtime(run)
    checks = _checks(run, base, ours, next(iter(texts.values())), runtime)
    others = _opponents(run, base, ours.stat().st_size)
    items, reason = _items(run)
    meter = _Meter(run, base, runtime, items, 1 + 3 * (1 + len(others)))
    folder = run.dir.stage_dir(NAME)
    for left in folder.glob("weight-kl-*"):  # of a run that was killed
        shutil.rmtree(left)
    kept = folder / "base-logits"  # some GB; taken up again after a kill
    with BaseLogits.compute(
        base.path,
        texts,
        N_CTX,
        run.profile.eval_windows,
        kept,
        runtime,
        progress=meter.step("the base's predictions"),
    ) as logits:
        output = meter.row(
            logits, Opponent(OURS, ours.name, partial(as_it_is, ours), is_rival=True)
        )
        rows, not_measured = [], []
        for other in others:
            try:
                rows.append(meter.row(logits, other))
            except QuantkitError as error:
                not_measured.append({"name": other.name, "reason": without_folders(str(error))})
                run.events.emit(NAME, "note", f"{other.name} was not measured: {error}")
    shutil.rmtree(kept)
    values = _report(run, base, ours, texts, meter)
    values["outputs"] = [
        {
            **output,
            "path": str(ours.relative_to(run.dir.path)),
            "budget_bytes": values["search"]["limit_bytes"],
            "sha256": sha256_file(ours),
            "zero_shot": {"status": "not run", "reason": reason} if reason else {"status": "done"},
            "generation": checks.generation,
            "tensors": _tensors(run, GgufFile(ours)),
        }
    ]
    values["baselines"] = sorted(rows, key=lambda row: row["n_bytes"])
    values["not_measured"] = not_measured
    values["integrity"] = to_json(checks.found)
    outputs = write_report(folder, values)
    summary = {"kl": output["kl"]["mean"], "top1": output["top1"], "n_bytes": output["n_bytes"]}
    return StageResult(outputs, summary)


# ---- integrity


@dataclass(frozen=True)
class _Checks:
    found: list[Check]
    generation: dict[str, str]


def _checks(run: Run, base: GgufFile, ours: Path, text: str, runtime: Runtime) -> _Checks:
    """All integrity checks. Raises QuantkitError when weights or metadata are not what they should
    be; what else fails is an event and stands in the report.
    """
    from evaluators import generation

    effort = EFFORTS[run.config.profile]
    file = GgufFile(ours)
    found = [integrity.same_weights(file, effort.rows), integrity.same_frame(file, base)]
    for check in found:
        if not check.passed:
            raise QuantkitError(
                f"{ours.name} is not what was stitched: {check.about}.",
                "This is a bug: please report it.",
            )
    found += _logit_checks(run, file, text, runtime)
    said = generation.answer(ours, _PROMPT, n_tokens=48, runtime=runtime)
    found.append(integrity.chat_check(said))
    for check in found:
        if not check.passed:
            word = "not run" if check.passed is None else "FAILED"
            run.events.emit(NAME, "note", f"{check.name}: {word}: {check.about}")
    return _Checks(found, said)


def _logit_checks(run: Run, file: GgufFile, text: str, runtime: Runtime) -> list[Check]:
    """PyTorch with the file's weights against llama.cpp, at F16 and on the file itself."""
    from evaluators import agreement
    from evaluators.weights import expanded_to_f16
    from quantkit.rowmap import load_row_maps

    names = ("logits at F16 against PyTorch's", "logits of the file against PyTorch's")
    maps = load_row_maps(run.dir.stage_dir("convert") / "rowmaps.safetensors")
    folder = fetch.load(run.dir).folder
    ids = agreement.tokens_of(file.path, text, N_CTX, runtime)
    try:
        logits = integrity.torch_logits(folder, maps, file, ids, run.config.device)
    except QuantkitError as error:
        return [Check(name, None, error.message) for name in names]
    with expanded_to_f16(file.path, run.dir.stage_dir(NAME), runtime) as f16:
        at_f16 = agreement.measure(f16, ids, logits, runtime)
    as_it_is = agreement.measure(file.path, ids, logits, runtime)
    return [
        integrity.logits_check(names[0], at_f16, integrity.F16_LIMIT),
        integrity.logits_check(names[1], as_it_is, integrity.FILE_LIMIT),
    ]


def _opponents(run: Run, base: GgufFile, n_bytes: int) -> list[Opponent]:
    """Stock files around our size, our own uniform files around it, and what the user named."""
    imatrix = read_imatrix(run.dir.stage_dir("calibrate") / "imatrix.gguf")
    effort = EFFORTS[run.config.profile]
    uniform = opponents.uniform_opponents(run.dir.stage_dir("quantize"), n_bytes)
    if not uniform:
        run.events.emit(NAME, "note", "the uniform files were dropped and are not measured")
    return [
        *opponents.stock_opponents(
            base, n_bytes, effort.n_below, run.config.target, imatrix, run.dir.stage_dir(NAME)
        ),
        *uniform[: effort.n_uniform],
        *opponents.given_opponents(run.config.compare),
    ]


# ---- measuring


class _Meter:
    """Measures files one after the other; keeps the output's tokens for the paired tests, and the
    base's answers.
    """

    def __init__(
        self, run: Run, base: GgufFile, runtime: Runtime, items: TaskItems | None, n_steps: int
    ) -> None:
        self._run, self._base, self._runtime, self._items = run, base, runtime, items
        self._effort = EFFORTS[run.config.profile]
        self._n_steps, self._at = n_steps, 0
        self._reference: tuple[KLResult, KLResult] | None = None
        self._answers: dict[str, ZeroShotResult] = {}
        self.first: KLResult | None = None
        self.n_weight_windows = 0

    def step(self, message: str) -> Callable[[int, int], None]:
        """The progress of the next step; all count alike."""
        at, self._at = self._at, self._at + 1

        def progress(done: int, total: int) -> None:
            share = 100 * at + 100 * done // max(total, 1)
            self._run.events.progress(NAME, share, 100 * self._n_steps, message)

        return progress

    def row(self, logits: BaseLogits, other: Opponent) -> dict[str, Any]:
        """Everything that is measured of one file. Raises QuantkitError when that fails."""
        from evaluators import kl
        from evaluators.errors import EvaluationError

        try:
            with other.open() as path:
                result = kl.measure(logits, path, self._runtime, self.step(f"KL of {other.name}"))
                weights = kl.measure_weights(
                    logits,
                    path,
                    self._run.dir.stage_dir(NAME),
                    self._runtime,
                    self.step(f"weight KL of {other.name}"),
                    self._effort.weight_windows,
                )
                row = self._figures(other, result, weights)
                progress = self.step(f"speed and answers of {other.name}")
                if other.is_rival:
                    row |= {"speed": self.speed(path), "tasks": self._tasks(path, progress)}
                return row
        except EvaluationError as error:
            raise QuantkitError(error.message, error.remedy) from error

    def _figures(self, other: Opponent, result: KLResult, weights: KLResult) -> dict[str, Any]:
        from evaluators import kl
        from evaluators.compare import paired_nll
        from evaluators.errors import EvaluationError

        values = result.to_json()
        kept = ("kl", "top1", "top1_stderr", "perplexity", "ln_ppl_ratio")
        row = {
            "kind": other.kind,
            "name": other.name,
            "n_bytes": result.n_bytes,
            "bpw": 8 * result.n_bytes / self._base.n_elements,
            **{k: values[k] for k in kept},
            "domains": {name: {k: d[k] for k in kept} for name, d in values["domains"].items()},
            **kl.weight_fields(weights),
        }
        if self._reference is None:
            self._reference, self.first = (result, weights), result
            self.n_weight_windows = weights.combined.n_windows
            return row
        first, first_weights = self._reference
        try:
            row["versus"] = {
                "kl": kl.paired_test(result, first).to_json(),
                "nll": paired_nll(result, first).to_json(),
                "weight_kl": kl.paired_test(weights, first_weights).to_json(),
            }
        except EvaluationError as error:
            row["versus"] = {"reason": error.message}
        return row

    def speed(self, path: Path) -> dict[str, Any]:
        """Tokens per second and memory, in a process of its own."""
        from evaluators import speed

        n_prompt, n_generate, n_repeats = self._effort.speed
        about = self._base.metadata
        n_ctx = min(2048, int(about[f"{about['general.architecture']}.context_length"]))
        n_prompt = min(n_prompt, n_ctx - n_generate)
        result = speed.measure(path, n_ctx, n_prompt, n_generate, n_repeats, self._runtime)
        return {**result.to_json(), "file": path.name}  # the report is published: no folders

    def _tasks(self, path: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Zero-shot accuracy beside the base's, and the answers that differ."""
        from evaluators import zeroshot

        items = self._items
        if items is None:
            return {}
        if items.name not in self._answers:
            self._answers[items.name] = zeroshot.run(self._base.path, items, runtime=self._runtime)
        reference = self._answers[items.name]
        result = zeroshot.run(path, items, runtime=self._runtime, progress=progress)
        flips = zeroshot.answer_flips(result, reference)
        return {
            items.name: {
                **result.to_json(),
                "source": items.source,
                "base": {metric: asdict(value) for metric, value in reference.accuracy.items()},
                "flips": {metric: asdict(value) for metric, value in flips.items()},
            }
        }


def _runtime(run: Run) -> Runtime:
    """The GPU when the run is on one and this llama.cpp can use it."""
    import llama_cpp.llama_cpp as lib

    from evaluators.llama_runtime import Runtime

    if run.config.device != "cuda":
        return Runtime()
    if not lib.llama_supports_gpu_offload():
        run.events.emit(NAME, "note", "this llama-cpp-python has no GPU support: measured on CPU")
        return Runtime()
    return Runtime(n_gpu_layers=-1)


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
    folder = run.dir.stage_dir("calibrate") / "eval"
    return {path.stem: path.read_bytes().decode("utf-8") for path in sorted(folder.glob("*.txt"))}


def _items(run: Run) -> tuple[TaskItems | None, str]:
    """The zero-shot items, or the reason why there are none."""
    from evaluators import tasks
    from evaluators.errors import EvaluationError

    n_items = EFFORTS[run.config.profile].n_items
    if run.config.tasks:
        return tasks.load("choices", data=Path(run.config.tasks)), ""
    if run.config.model == DEMO_MODEL:
        return tasks.load("everyday", limit=n_items), ""
    reason = hub.why_offline(hub.resolve_token())
    if reason:
        return None, f"no --tasks file, and {reason}"
    try:
        return tasks.load("piqa", limit=n_items), ""
    except EvaluationError as error:  # a data set that nobody asked for fails no run
        return None, f"no --tasks file, and {error.message}"


# ---- the report


def _report(
    run: Run, base: GgufFile, ours: Path, texts: Mapping[str, str], meter: _Meter
) -> dict[str, Any]:
    """What the report says beside its rows."""
    first = meter.first
    assert first is not None
    info = fetch.load(run.dir).info
    search = run.dir.stage_dir("search")
    return {
        "schema": SCHEMA,
        "kind": "run",
        "model": info.id,
        "revision": info.sha,
        "base": {
            "path": str(base.path.relative_to(run.dir.path)),
            "n_bytes": base.path.stat().st_size,
            "sha256": run.records["convert"].outputs[0].sha256,
            "n_parameters": base.n_elements,
            "perplexity": asdict(first.combined.base_perplexity),
            "speed": meter.speed(base.path),
        },
        "protocol": f"llama.cpp's windows of {N_CTX} tokens, second half scored,"
        " KL(base || file) in nats",
        "n_windows": first.combined.n_windows,
        "weight_windows": meter.n_weight_windows,
        "texts": {name: first.text_sha256[name] for name in texts},
        "calibration": read_json(run.dir.stage_dir("calibrate") / "calibration.json"),
        "search": read_json(search / "budget.json"),
        "trace": _trace(search / "trace.jsonl"),
        "fallbacks": read_json(run.dir.stage_dir("quantize") / "errors.json")["fallbacks"],
        "unmapped": run.records["convert"].summary["unmapped"],
        "versions": _versions(),
    }


def _trace(path: Path) -> list[dict[str, Any]]:
    if not path.exists():  # nothing was searched
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _tensors(run: Run, file: GgufFile) -> dict[str, dict[str, Any]]:
    """How every quantizable tensor of the output is stored."""
    chosen = stitch.load_allocation(run)
    return {
        name: {
            "qtype": str(file.tensors[name].qtype),
            "method": key.method,
            "n_elements": math.prod(file.tensors[name].shape),
            "n_bytes": file.tensors[name].n_bytes,
        }
        for name, key in chosen.items()
    }


def _versions() -> dict[str, str]:
    found: Mapping[str, str] = {name: version(name) for name in _PACKAGES}
    return {"quantkit": __version__, "python": platform.python_version(), **found}
