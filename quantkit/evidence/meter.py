"""Measure one file for validate: KL, the KL of its weights, speed and zero-shot answers, in the
same way for every file of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.evidence.baselines import Baseline
from quantkit.evidence.devices import Device
from quantkit.evidence.receipt.claims import Claims
from quantkit.evidence.receipt.schema import OF_FILE, OF_WEIGHTS
from quantkit.evidence.report.measures import Measures
from quantkit.evidence.report.schema import OURS, Figures, Row, Task, Tests
from quantkit.evidence.report.text import without_folders
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.place import weights_room

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.choice_items import TaskItems
    from evaluators.figures import Divergence, SpeedResult
    from evaluators.kl import KLResult, KLSummary
    from evaluators.overlap import Seen
    from evaluators.zeroshot import ZeroShotResult
    from quantkit.evidence.in_use import InUse
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
        device: Device,
        items: TaskItems | None,
        measures: Measures,
        n_steps: int,
        seen: Seen,
    ) -> None:
        self.measures = measures
        self.seen = seen  # what was calibrated on
        self.device = device
        self._run, self._base, self._runtime, self._items = run, base, device.runtime, items
        self._effort = run.profile.effort
        self._n_steps, self._at = n_steps, 0
        self._ours: dict[str, tuple[KLResult | None, KLResult | None]] = {}
        self._answers: dict[str, ZeroShotResult] = {}
        self.claims = Claims()
        self.long: dict[int, BaseLogits] = {}  # by tokens of a window
        self.in_use: InUse | None = None
        self.first: KLResult | None = None
        self.n_weight_windows = 0

    def step(self, message: str) -> Callable[[int, int], None]:
        """Return a function that reports the next step's progress; all steps count the same."""
        at, self._at = self._at, self._at + 1

        def progress(done: int, total: int) -> None:
            share = 100 * at + 100 * done // max(total, 1)
            self._run.events.progress(_STAGE, share, 100 * self._n_steps, message)

        return progress

    def ours(self, logits: BaseLogits | None, file: Baseline) -> Row:
        """Measure everything possible of an output; what is not possible is in `measures`. `logits`
        are None where the base's predictions could not be computed.
        """
        with file.open() as path:
            row = self._row(logits, file, path, self._kl(logits, file, path))
            return replace(row, device_kl=self.device_kl(logits, file.name, path))

    def beside(self, logits: BaseLogits | None, other: Baseline) -> Row | None:
        """Measure a file to compare ours with; None when it cannot be compared with the base."""

        def measure() -> Row | None:
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
        found = self.measures.take(f"KL of {other.name}", measure)
        self.claims.add_windows(other, OF_FILE, found)
        return found

    def _row(
        self, logits: BaseLogits | None, other: Baseline, path: Path, result: KLResult | None
    ) -> Row:
        take, name = self.measures.take, other.name
        weights = self._weight_kl(logits, other, path)
        progress = self.step(f"speed and answers of {name}")
        n_bytes = path.stat().st_size if result is None else result.n_bytes
        row = Row(
            kind=other.kind,
            name=name,
            n_bytes=n_bytes,
            bpw=8 * n_bytes / self._base.n_elements,
            **vars(_figures(result.combined) if result else Figures()),
            domains={n: _figures(d) for n, d in result.domains.items()} if result else {},
            weight_kl=weights.combined.kl if weights else None,
            weight_top1=weights.combined.top1 if weights else None,
            weight_domains={n: d.kl for n, d in weights.domains.items()} if weights else None,
            versus=self._tests(other, result, weights),
        )
        if not other.is_rival:
            return row
        talking = self.step(f"conversations with {name}")
        used = self.in_use and self.in_use.of(other, path, talking)
        return replace(
            row,
            **(used or {}),
            speed=take(f"speed of {name}", lambda: self.speed(path)),
            tasks=take(f"answers of {name}", lambda: self._tasks(other, path, progress)) or {},
            long=self._long(other, path),
        )

    def _weight_kl(self, logits: BaseLogits | None, other: Baseline, path: Path) -> KLResult | None:
        from evaluators import kl
        from quantkit.machine.memory import free_memory  # needs torch

        progress = self.step(f"weight KL of {other.name}")
        if logits is None:
            return None
        folder, n_windows = self._run.artifacts.folder(_STAGE), self._effort.weight_windows
        memory = weights_room(free_memory())
        measure = partial(
            kl.measure_weights, logits, path, folder, self._runtime, progress, n_windows, memory
        )
        found = self.measures.take(f"weight KL of {other.name}", measure)
        self.claims.add_windows(other, OF_WEIGHTS, found)
        return found

    def _long(self, other: Baseline, path: Path) -> dict[str, Divergence]:
        from evaluators import kl

        found = {
            n: self.measures.take(
                f"KL of {other.name} in a context of {n:,} tokens",
                partial(kl.measure, logits, path, self._runtime),
            )
            for n, logits in self.long.items()
        }
        for result in found.values():
            self.claims.add_windows(other, OF_FILE, result)
        return {str(n): result.combined.kl for n, result in found.items() if result is not None}

    def _tests(
        self, other: Baseline, result: KLResult | None, weights: KLResult | None
    ) -> dict[str, Tests] | None:
        """The paired tests by output; of an output none: it is kept for those of the others."""
        self.first = self.first or result
        if weights is not None and not self.n_weight_windows:
            self.n_weight_windows = weights.combined.n_windows
        if other.kind == OURS:
            self._ours[other.name] = result, weights
        if other.kind == OURS or result is None:
            return None
        return {name: self._versus(result, weights, *ours) for name, ours in self._ours.items()}

    def _versus(
        self,
        result: KLResult,
        weights: KLResult | None,
        ours: KLResult | None,
        ours_weights: KLResult | None,
    ) -> Tests:
        """The paired tests against one of our files; a reason where there are too few windows."""
        from evaluators import kl
        from evaluators.compare import paired_nll
        from evaluators.errors import EvaluationError

        both = (weights, ours_weights) if weights and ours_weights else None
        try:
            return Tests(
                kl=kl.paired_test(result, ours) if ours else None,
                nll=paired_nll(result, ours) if ours else None,
                weight_kl=kl.paired_test(*both) if both else None,
            )
        except EvaluationError as error:
            return Tests(reason=error.message)

    def device_kl(self, logits: BaseLogits | None, name: str, path: Path) -> Divergence | None:
        """Measure how far the GPU is from the CPU on one file; None where both are the CPU."""
        from evaluators import kl

        if logits is None or not self.device.is_gpu:
            return None
        text = next(iter(logits.texts.values()))
        measure = partial(kl.between_devices, path, text, self._runtime, self.device.on_cpu)
        return self.measures.take(f"the GPU against the CPU on {name}", measure)

    def speed(self, path: Path) -> SpeedResult:
        """Measure tokens per second and memory, in a process of its own."""
        from evaluators import speed

        n_prompt, n_generate, n_repeats = self._effort.speed
        n_ctx = min(2048, self._base.context_length)
        n_prompt = min(n_prompt, n_ctx - n_generate)
        result = speed.measure(path, n_ctx, n_prompt, n_generate, n_repeats, self._runtime)
        return replace(result, file=path.name)  # the report is published: no folders

    def _tasks(
        self, other: Baseline, path: Path, progress: Callable[[int, int], None]
    ) -> dict[str, Task]:
        """Zero-shot accuracy beside the base's, and the answers that differ."""
        from evaluators import zeroshot

        items = self._items
        if items is None:
            return {}
        if items.name not in self._answers:
            self._answers[items.name] = zeroshot.run(self._base.path, items, runtime=self._runtime)
        reference = self._answers[items.name]
        result = zeroshot.run(path, items, runtime=self._runtime, progress=progress)
        source, is_given = without_folders(items.source), self._run.config.tasks is not None
        self.claims.add_answers(other, source, is_given, result, reference)
        task = Task(
            task=result.task,
            n_items=result.n_items,
            **result.accuracy,
            items_sha256=result.items_sha256,
            seconds=result.seconds,
            source=source,
            base=reference.accuracy,
            flips=zeroshot.answer_flips(result, reference),
            overlap=self.seen.overlap_of_items(items.items),
        )
        return {items.name: task}


def _figures(found: KLSummary) -> Figures:
    return Figures(found.kl, found.top1, found.top1_stderr, found.perplexity, found.ln_ppl_ratio)
