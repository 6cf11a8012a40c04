"""Measure one file for validate: KL, the KL of its weights, speed and zero-shot answers, in the
same way for every file of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.evidence.baselines import Baseline
from quantkit.evidence.report.measures import Measures
from quantkit.evidence.report.schema import OURS
from quantkit.gguf_file.read import GgufFile

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.kl import KLResult
    from evaluators.llama_runtime import Runtime
    from evaluators.tasks.items import TaskItems
    from evaluators.zeroshot import ZeroShotResult
    from quantkit.run.stage import Run

_STAGE = "validate"


class Meter:
    """Measures files one after the other; keeps the outputs' tokens for the paired tests, and the
    base's answers.
    """

    def __init__(
        self,
        run: Run,
        base: GgufFile,
        runtime: Runtime,
        items: TaskItems | None,
        measures: Measures,
        n_steps: int,
    ) -> None:
        self.measures = measures
        self._run, self._base, self._runtime, self._items = run, base, runtime, items
        self._effort = run.profile.effort
        self._n_steps, self._at = n_steps, 0
        self._ours: dict[str, tuple[KLResult | None, KLResult | None]] = {}
        self._answers: dict[str, ZeroShotResult] = {}
        self.long: dict[int, BaseLogits] = {}  # by tokens of a window
        self.first: KLResult | None = None
        self.n_weight_windows = 0

    def step(self, message: str) -> Callable[[int, int], None]:
        """Return a function that reports the next step's progress; all steps count the same."""
        at, self._at = self._at, self._at + 1

        def progress(done: int, total: int) -> None:
            share = 100 * at + 100 * done // max(total, 1)
            self._run.events.progress(_STAGE, share, 100 * self._n_steps, message)

        return progress

    def ours(self, logits: BaseLogits | None, file: Baseline) -> dict[str, Any]:
        """Measure everything possible of an output; what is not possible is in `measures`. `logits`
        are None where the base's predictions could not be computed.
        """
        with file.open() as path:
            return self._row(logits, file, path, self._kl(logits, file, path))

    def beside(self, logits: BaseLogits | None, other: Baseline) -> dict[str, Any] | None:
        """Measure a file to compare ours with; None when it cannot be compared with the base."""

        def measure() -> dict[str, Any] | None:
            with other.open() as path:
                result = self._kl(logits, other, path)
                return None if result is None else self._row(logits, other, path, result)

        return self.measures.take(other.name, measure)

    def _kl(self, logits: BaseLogits | None, other: Baseline, path: Path) -> KLResult | None:
        from evaluators import kl

        progress = self.step(f"KL of {other.name}")
        if logits is None:
            return None
        measure = partial(kl.measure, logits, path, self._runtime, progress)
        return self.measures.take(f"KL of {other.name}", measure)

    def _row(
        self, logits: BaseLogits | None, other: Baseline, path: Path, result: KLResult | None
    ) -> dict[str, Any]:
        from evaluators import kl

        take, name = self.measures.take, other.name
        weights = None
        progress = self.step(f"weight KL of {name}")
        if logits is not None:
            folder, n_windows = self._run.artifacts.folder(_STAGE), self._effort.weight_windows
            measure = partial(
                kl.measure_weights, logits, path, folder, self._runtime, progress, n_windows
            )
            weights = take(f"weight KL of {name}", measure)
        row = self._figures(other, path, result, weights)
        progress = self.step(f"speed and answers of {name}")
        if other.is_rival:
            row["speed"] = take(f"speed of {name}", lambda: self.speed(path))
            row["tasks"] = take(f"answers of {name}", lambda: self._tasks(path, progress)) or {}
            row["long"] = {}
            for n, long in self.long.items():
                found = take(
                    f"KL of {name} in a context of {n:,} tokens",
                    partial(kl.measure, long, path, self._runtime),
                )
                if found is not None:
                    row["long"][str(n)] = found.to_json()["kl"]
        return row

    def _figures(
        self, other: Baseline, path: Path, result: KLResult | None, weights: KLResult | None
    ) -> dict[str, Any]:
        from evaluators import kl

        kept = ("kl", "top1", "top1_stderr", "perplexity", "ln_ppl_ratio")
        unknown: dict[str, Any] = {**dict.fromkeys(kept), "domains": {}}
        values = unknown if result is None else result.to_json()
        n_bytes = path.stat().st_size if result is None else result.n_bytes
        row = {
            "kind": other.kind,
            "name": other.name,
            "n_bytes": n_bytes,
            "bpw": 8 * n_bytes / self._base.n_elements,
            **{k: values[k] for k in kept},
            "domains": {name: {k: d[k] for k in kept} for name, d in values["domains"].items()},
            **(kl.weight_fields(weights) if weights else {}),
        }
        self.first = self.first or result
        if weights is not None and not self.n_weight_windows:
            self.n_weight_windows = weights.combined.n_windows
        if other.kind == OURS:
            self._ours[other.name] = result, weights
        elif result is not None:
            row["versus"] = {
                name: self._versus(result, weights, *ours) for name, ours in self._ours.items()
            }
        return row

    def _versus(
        self,
        result: KLResult,
        weights: KLResult | None,
        ours: KLResult | None,
        ours_weights: KLResult | None,
    ) -> dict[str, Any]:
        """The paired tests against one of our files; a reason where there are too few windows."""
        from evaluators import kl
        from evaluators.compare import paired_nll
        from evaluators.errors import EvaluationError

        found: dict[str, Any] = {}
        try:
            if ours is not None:
                found["kl"] = kl.paired_test(result, ours).to_json()
                found["nll"] = paired_nll(result, ours).to_json()
            if weights is not None and ours_weights is not None:
                found["weight_kl"] = kl.paired_test(weights, ours_weights).to_json()
        except EvaluationError as error:
            return {"reason": error.message}
        return found

    def speed(self, path: Path) -> dict[str, Any]:
        """Measure tokens per second and memory, in a process of its own."""
        from evaluators import speed

        n_prompt, n_generate, n_repeats = self._effort.speed
        n_ctx = min(2048, self._base.context_length)
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
