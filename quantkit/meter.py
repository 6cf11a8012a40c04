"""How validate measures one file: KL, the KL of its weights, speed and zero-shot answers; every
file of a run in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.ggufio.read import GgufFile
from quantkit.opponents import Opponent
from quantkit.report.schema import OURS

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.kl import KLResult
    from evaluators.llama_runtime import Runtime
    from evaluators.tasks.items import TaskItems
    from evaluators.zeroshot import ZeroShotResult
    from quantkit.pipeline import Run

_STAGE = "validate"


@dataclass(frozen=True)
class Effort:
    """What a profile spends beside the KL of each file."""

    n_below: int  # stock files of at most our size that are measured: the largest ones
    n_uniform: int  # of our own uniform files: the largest of at most our size, the next larger
    weight_windows: int | None  # of each domain, for the KL of the weights alone; None: all
    rows: int | None  # of each tensor, decoded a second time; None: all
    n_items: int  # zero-shot items
    speed: tuple[int, int, int]  # tokens of prompt and of answer, repeats
    long: tuple[int, ...] = ()  # tokens of a window, for the KL in long contexts


EFFORTS = {
    "demo": Effort(3, 0, 2, 32, 60, (128, 32, 2)),
    "fast": Effort(2, 2, 10, None, 200, (256, 32, 2), (4096,)),
    "standard": Effort(3, 2, None, None, 500, (512, 64, 3), (4096, 16_384)),
    "thorough": Effort(3, 2, None, None, 2000, (512, 64, 3), (4096, 16_384, 32_768)),
}


class Meter:
    """Measures files one after the other; keeps the outputs' tokens for the paired tests, and the
    base's answers.
    """

    def __init__(
        self, run: Run, base: GgufFile, runtime: Runtime, items: TaskItems | None, n_steps: int
    ) -> None:
        self._run, self._base, self._runtime, self._items = run, base, runtime, items
        self._effort = EFFORTS[run.config.profile]
        self._n_steps, self._at = n_steps, 0
        self._ours: dict[str, tuple[KLResult, KLResult]] = {}
        self._answers: dict[str, ZeroShotResult] = {}
        self.long: dict[int, BaseLogits] = {}  # by tokens of a window
        self.first: KLResult | None = None
        self.n_weight_windows = 0

    def step(self, message: str) -> Callable[[int, int], None]:
        """The progress of the next step; all count alike."""
        at, self._at = self._at, self._at + 1

        def progress(done: int, total: int) -> None:
            share = 100 * at + 100 * done // max(total, 1)
            self._run.events.progress(_STAGE, share, 100 * self._n_steps, message)

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
                    self._run.dir.stage_dir(_STAGE),
                    self._runtime,
                    self.step(f"weight KL of {other.name}"),
                    self._effort.weight_windows,
                )
                row = self._figures(other, result, weights)
                progress = self.step(f"speed and answers of {other.name}")
                if other.is_rival:
                    row |= {"speed": self.speed(path), "tasks": self._tasks(path, progress)}
                    row["long"] = {
                        str(n): kl.measure(logits, path, self._runtime).to_json()["kl"]
                        for n, logits in self.long.items()
                    }
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
        if other.kind == OURS:
            self._ours[other.name] = result, weights
            self.first, self.n_weight_windows = result, weights.combined.n_windows
            return row
        versus: dict[str, Any] = {}
        row["versus"] = versus
        for name, (ours, ours_weights) in self._ours.items():
            try:
                versus[name] = {
                    "kl": kl.paired_test(result, ours).to_json(),
                    "nll": paired_nll(result, ours).to_json(),
                    "weight_kl": kl.paired_test(weights, ours_weights).to_json(),
                }
            except EvaluationError as error:
                versus[name] = {"reason": error.message}
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


def check_text(path: Path) -> None:
    """Raises QuantkitError when validate could not measure on this text."""
    from evaluators.errors import EvaluationError
    from evaluators.texts import read_text

    try:
        text = read_text(path)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from None
    if not text.strip():
        raise QuantkitError(f"The text {path} is empty.", "Give another --eval-text.")


def check_items(path: Path) -> None:
    """Raises QuantkitError when validate could not ask these questions."""
    from evaluators import tasks
    from evaluators.errors import EvaluationError

    try:
        tasks.load("choices", data=path)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from None
