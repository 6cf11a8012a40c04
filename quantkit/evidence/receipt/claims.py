"""Collect what validate measures, as a receipt has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluators.figures import WindowMeans
from quantkit.evidence.baselines import Baseline
from quantkit.evidence.receipt.schema import Answers, UsedTokens, Windows

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.kl import KLResult
    from evaluators.zeroshot import ZeroShotResult


class Claims:
    """Grows while files are measured."""

    def __init__(self) -> None:
        self.tokens: list[UsedTokens] = []
        self.windows: list[Windows] = []
        self.answers: list[Answers] = []

    def add_tokens(self, logits: BaseLogits) -> None:
        """Add the windows that the base was decoded on."""
        for text, store in logits.stores.items():
            cut = store.windows
            self.tokens.append(UsedTokens(text, cut.n_ctx, cut.n_windows, cut.sha256()))

    def add_windows(self, file: Baseline, measure: str, result: KLResult | None) -> None:
        """Add the means of every window; nothing of what could not be measured."""
        for text, scores in (result.tokens if result else {}).items():
            assert result is not None
            means = _shortened(scores.by_window())
            self.windows.append(Windows(file.name, file.kind, measure, text, result.n_ctx, means))

    def add_answers(
        self,
        file: Baseline,
        source: str,
        is_given: bool,
        result: ZeroShotResult,
        base: ZeroShotResult,
    ) -> None:
        """Add what a file and the base picked."""
        picks, base_picks = (found.picks["acc"] for found in (result, base))
        self.answers.append(
            Answers(
                file.name,
                file.kind,
                result.task,
                source,
                is_given,
                result.items_sha256,
                picks,
                base_picks,
            )
        )


def _shortened(means: WindowMeans) -> WindowMeans:
    """Eight digits of every figure: more is noise, and a receipt is read by people, too."""

    def short(column: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(float(f"{x:.8g}") for x in column)

    return WindowMeans(*map(short, (means.kl, means.nll, means.base_nll, means.top1)))
