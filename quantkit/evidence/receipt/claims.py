"""Collect what validate measures, as a receipt has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluators.figures import WindowMeans
from quantkit.evidence.baselines import Baseline
from quantkit.evidence.receipt.schema import (
    BASE,
    Answers,
    Replies,
    Talks,
    UsedPrompts,
    UsedTalks,
    UsedTokens,
    Windows,
)

if TYPE_CHECKING:
    from evaluators.base_logits import BaseLogits
    from evaluators.beside import Reply
    from evaluators.document_kl import DocumentResult
    from evaluators.documents import Documents
    from evaluators.generation import GenerationResult
    from evaluators.generation import Replies as AllReplies
    from evaluators.kl import KLResult
    from evaluators.zeroshot import ZeroShotResult


class Claims:
    """Grows while files are measured."""

    def __init__(self) -> None:
        self.tokens: list[UsedTokens] = []
        self.windows: list[Windows] = []
        self.answers: list[Answers] = []
        self.used_talks: UsedTalks | None = None
        self.talks: list[Talks] = []
        self.used_prompts: UsedPrompts | None = None
        self.replies: list[Replies] = []

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

    def add_used_talks(self, documents: Documents, limit: int | None) -> None:
        """Add the conversations that the base was read on."""
        every = documents.documents
        self.used_talks = UsedTalks(
            limit,
            documents.sha256(),
            tuple(one.domain for one in every),
            tuple(one.group for one in every),
            tuple(one.n_scored for one in every),
        )

    def add_talks(self, name: str, kind: str, measure: str, result: DocumentResult | None) -> None:
        """Add the means of every conversation; nothing of what could not be measured."""
        if result is not None:
            kl = tuple(float(one.kl.mean()) for one in result.scores)
            top1 = tuple(float(one.same_top.mean()) for one in result.scores)
            self.talks.append(Talks(name, kind, measure, _short(kl), _short(top1)))

    def add_base_replies(self, found: AllReplies, n: int) -> None:
        """Add the base's answers to those of the first `n` prompts that can be asked."""
        asked = found.asked
        names = tuple(prompt.name for prompt in asked.prompts)
        self.used_prompts = UsedPrompts(
            n, names, asked.begun, asked.n_new, asked.sha256(), asked.asked, asked.reason
        )
        agreed = tuple(len(chosen) for chosen in found.choices)
        self._add_replies(BASE, BASE, found.replies, agreed)

    def add_replies(self, file: Baseline, result: GenerationResult | None) -> None:
        """Add a file's answers."""
        if result is not None:
            theirs = [pair[1] for pair in result.replies]
            self._add_replies(file.name, file.kind, theirs, result.agreed)

    def _add_replies(
        self, name: str, kind: str, found: Sequence[Reply], agreed: tuple[int, ...]
    ) -> None:
        self.replies.append(
            Replies(
                name,
                kind,
                tuple(reply.answer.tokens for reply in found),
                tuple(reply.answer.ended for reply in found),
                tuple(reply.text for reply in found),
                agreed,
            )
        )


def _short(column: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{x:.8g}") for x in column)


def _shortened(means: WindowMeans) -> WindowMeans:
    """Eight digits of every figure: more is noise, and a receipt is read by people, too."""
    return WindowMeans(*map(_short, (means.kl, means.nll, means.base_nll, means.top1)))
