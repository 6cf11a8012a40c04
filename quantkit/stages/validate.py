"""validate: the real files in llama.cpp, against the full-precision base and llama.cpp's own files.

Perplexity, KL divergence, top-1 agreement, a zero-shot task and a short generation, on text that no
earlier stage has seen. Beside the output stand stock files made here with the same imatrix: the
best of at most its size and the next larger one. Writes `report.json` and `report.md`. Only this
stage imports `evaluators`; the search never grades itself.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__, hub, report
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.errors import QuantkitError
from quantkit.ggufio.imatrix import read_imatrix
from quantkit.ggufio.read import GgufFile
from quantkit.kquants.stock import STOCK_MIXES, StockRecipe, make_stock, stock_bytes
from quantkit.qtypes import FILE_TYPES, QUANTIZED
from quantkit.rundir import read_json, replacing, sha256_file, write_json
from quantkit.stages import StageResult, convert, fetch

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.kl import KLResult
    from evaluators.tasks.items import TaskItems
    from quantkit.pipeline import Run

NAME = "validate"
VERSION = 1
FIELDS = ("eval_text", "tasks")

N_CTX = 512
_N_BELOW = 3  # stock files of at most our size that are measured: the largest ones
_PACKAGES = (
    "llama-cpp-python",
    "torch",
    "transformers",
    "gguf",
    "huggingface_hub",
    "datasets",
    "numpy",
)


def extra_inputs(config: RunConfig) -> dict[str, Any]:
    """The contents of the files that the config names."""
    named = {"eval_text": config.eval_text, "tasks": config.tasks}
    return {
        f"{k}_sha256": sha256_file(Path(v)) for k, v in named.items() if v and Path(v).is_file()
    }


def execute(run: Run) -> StageResult:
    """Raises QuantkitError when a file does not load or gives logits that are not finite."""
    from evaluators.errors import EvaluationError

    try:
        return _validate(run)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from error


def _validate(run: Run) -> StageResult:
    from evaluators import kl
    from evaluators.base_logits import BaseLogits

    folder = run.dir.stage_dir(NAME)
    base = convert.load_base(run.dir)
    ours = [
        run.dir.path / o.path for o in run.records["stitch"].outputs if o.path.endswith(".gguf")
    ]
    texts = _texts(run)
    recipes = _baselines(run, base, ours[0].stat().st_size)
    n_steps = 2 * len(ours) + len(recipes) + 2
    step = 0

    def advance(message: str) -> Callable[[int, int], None]:
        nonlocal step
        at, step = step, step + 1

        def progress(done: int, total: int) -> None:
            run.events.progress(
                NAME, 100 * at + 100 * done // max(total, 1), 100 * n_steps, message
            )

        return progress

    outputs: list[Path] = []
    with BaseLogits.compute(
        base.path,
        texts,
        N_CTX,
        run.profile.eval_windows,
        progress=advance("the base's predictions"),
    ) as logits:
        results = {
            path: kl.measure(logits, path, progress=advance(f"KL of {path.name}")) for path in ours
        }
        baselines = [_measure_baseline(run, base, logits, recipe, advance) for recipe in recipes]
        base_perplexity = next(iter(results.values())).combined.base_perplexity
    items, reason = _items(run)
    zero_shot = [_zero_shot(path, base.path, items, reason, advance("zero-shot")) for path in ours]
    generations = [_generate(path) for path in ours]
    values = {
        "schema": 1,
        "model": fetch.load(run.dir).info.id,
        "base": {
            "path": str(base.path.relative_to(run.dir.path)),
            "n_bytes": base.path.stat().st_size,
            "sha256": run.records["convert"].outputs[0].sha256,
            "n_parameters": base.n_elements,
            "perplexity": vars(base_perplexity),
        },
        "outputs": [
            {
                "path": str(path.relative_to(run.dir.path)),
                **_row(results[path], base.n_elements),
                "budget_bytes": read_json(run.dir.stage_dir("search") / "budget.json")[
                    "limit_bytes"
                ],
                "sha256": sha256_file(path),
                "zero_shot": zero,
                "generation": generation,
            }
            for path, zero, generation in zip(ours, zero_shot, generations, strict=True)
        ],
        "baselines": sorted(baselines, key=lambda row: row["n_bytes"]),
        "protocol": f"llama.cpp: windows of {N_CTX} tokens, second half scored,"
        " KL(base || file) in nats",
        "texts": {name: next(iter(results.values())).text_sha256[name] for name in texts},
        "calibration": read_json(run.dir.stage_dir("calibrate") / "calibration.json"),
        "search": read_json(run.dir.stage_dir("search") / "budget.json"),
        "fallbacks": read_json(run.dir.stage_dir("quantize") / "errors.json")["fallbacks"],
        "unmapped": run.records["convert"].summary["unmapped"],
        "versions": _versions(),
    }
    outputs += [write_json(folder / "report.json", values)]
    with replacing(folder / "report.md") as partial:
        partial.write_text(report.markdown(values), "utf-8")
    outputs.append(folder / "report.md")
    first = values["outputs"][0]
    return StageResult(
        outputs, {"kl": first["kl"]["mean"], "top1": first["top1"], "n_bytes": first["n_bytes"]}
    )


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


def _baselines(run: Run, base: GgufFile, n_bytes: int) -> list[StockRecipe]:
    """Stock files around our size: the largest of at most it, the next larger one, and the one we
    were asked to be like.
    """
    recipes = [StockRecipe(label) for label in STOCK_MIXES]
    recipes += [
        StockRecipe(q.name, pure=True)
        for q in QUANTIZED
        if q.name in FILE_TYPES and q.name in STOCK_MIXES
    ]
    sizes = {recipe: stock_bytes(base, recipe) for recipe in recipes}
    # Of two files of one size the mix is the better known name.
    by_size = {
        size: recipe for recipe, size in sorted(sizes.items(), key=lambda item: not item[0].pure)
    }
    below = sorted((size for size in by_size if size <= n_bytes), reverse=True)[:_N_BELOW]
    above = sorted(size for size in by_size if size > n_bytes)[:1]
    chosen = [by_size[size] for size in [*sorted(below), *above]]
    target = run.config.target
    liked = StockRecipe(target.value) if target and target.kind == "like" else None
    if liked and liked.label in STOCK_MIXES and sizes[liked] not in (*below, *above):
        chosen.append(liked)
    return chosen


def _measure_baseline(
    run: Run,
    base: GgufFile,
    logits: BaseLogits,
    recipe: StockRecipe,
    advance: Callable[[str], Callable[[int, int], None]],
) -> dict[str, Any]:
    """Make a stock file with llama.cpp and our imatrix, measure it, and drop it."""
    from evaluators import kl

    imatrix = read_imatrix(run.dir.stage_dir("calibrate") / "imatrix.gguf")
    path = run.dir.stage_dir(NAME) / f"stock-{recipe.label}{'-pure' if recipe.pure else ''}.gguf"
    progress = advance(f"KL of llama.cpp's {recipe}")
    try:
        make_stock(base.path, path, recipe, imatrix)
        result = kl.measure(logits, path, progress=progress)
    finally:
        path.unlink(missing_ok=True)
    return {"name": str(recipe), **_row(result, base.n_elements)}


def _row(result: KLResult, n_parameters: int) -> dict[str, Any]:
    """The figures of one file, combined and by domain."""
    values = result.to_json()
    kept = ("kl", "top1", "top1_stderr", "perplexity", "ln_ppl_ratio")
    domains = {name: {k: d[k] for k in kept} for name, d in values["domains"].items()}
    return {
        "n_bytes": result.n_bytes,
        "bpw": 8 * result.n_bytes / n_parameters,
        **{k: values[k] for k in kept},
        "domains": domains,
    }


def _items(run: Run) -> tuple[TaskItems | None, str]:
    """The zero-shot items, or the reason why there are none."""
    from evaluators import tasks

    if run.config.tasks:
        return tasks.load("choices", data=Path(run.config.tasks)), ""
    if run.config.model == DEMO_MODEL:
        return tasks.load("everyday"), ""
    reason = hub.why_offline(hub.resolve_token())
    if reason:
        return None, f"no --tasks file, and {reason}"
    return tasks.load("piqa", limit=500), ""


def _zero_shot(
    path: Path,
    base: Path,
    items: TaskItems | None,
    reason: str,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    from evaluators import zeroshot

    if items is None:
        return {"status": "not run", "reason": reason}
    reference = zeroshot.run(base, items)
    result = zeroshot.run(path, items, progress=progress)
    flips = zeroshot.answer_flips(result, reference)
    return {
        "status": "done",
        **result.to_json(),
        "base": {metric: vars(value) for metric, value in reference.accuracy.items()},
        "flips": {metric: vars(value) for metric, value in flips.items()},
    }


def _generate(path: Path) -> dict[str, str]:
    """A short greedy answer: the file talks."""
    from evaluators import generation

    return generation.answer(path, "Name three things that float on water.", n_tokens=48)


def _versions() -> dict[str, str]:
    found: Mapping[str, str] = {name: version(name) for name in _PACKAGES}
    return {"quantkit": __version__, "python": platform.python_version(), **found}
