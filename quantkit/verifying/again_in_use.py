"""Measure conversations and answers again, those that were drawn.

Of conversations the KL is taken anew, as of windows. Answers are not given anew: one early token
that another build rounds otherwise changes all that follows. Each model reads the claimed answers,
and has to find the claimed token the likeliest at every place, or all but so: what somebody
made up, or another file said, does not pass for greedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evaluators import conversations, document_kl, generation, greedy
from evaluators.beside import Asked
from evaluators.chat import I32
from evaluators.document_kl import DocumentLogits, DocumentResult
from evaluators.documents import Documents, gather
from evaluators.errors import EvaluationError
from evaluators.greedy import Answer
from evaluators.llama_runtime import Model
from quantkit.evidence.devices import Device
from quantkit.evidence.receipt import Receipt
from quantkit.evidence.receipt.schema import (
    BASE,
    OF_FILE,
    OF_WEIGHTS,
    Replies,
    Talks,
    UsedPrompts,
    UsedTalks,
)
from quantkit.evidence.report.schema import OURS
from quantkit.llamacpp.place import weights_room
from quantkit.verifying.again import measured_again
from quantkit.verifying.findings import Finding, compared, other_device

_WINDOW = 255  # scored tokens of those windows that limits are of
_TALKS, _ANSWERS = "KL in conversations", "answers"
_OTHERS = "this version of quantkit has other {}, or renders them otherwise"


@dataclass(frozen=True)
class AgainInUse:
    """Measures the files of one receipt. `files` are ours by name, `folder` has room for weights at
    F16; `note` is told what is being done.
    """

    receipt: Receipt
    files: Mapping[str, Path]
    device: Device
    folder: Path
    note: Callable[[str], None]

    # ---- conversations

    def talks(self, base: Path, drawn: Sequence[int]) -> list[Finding]:
        """Return what the drawn conversations come to."""
        asked = self.receipt.used_talks
        if asked is None or not drawn:
            return []
        self.note(f"the full-precision file on {len(drawn)} conversations")
        try:
            found = self._gathered(base, asked)
            if found is None:
                return [Finding(_TALKS, None, _OTHERS.format("conversations"))]
            some = tuple(found.documents[i] for i in drawn)
            part = Documents(some, found.asked, found.reason, {})
            with DocumentLogits.compute(base, part, runtime=self.device.runtime) as logits:
                return list(self._read(logits, base, asked, drawn))
        except EvaluationError as error:
            return [Finding(_TALKS, None, error.message.rstrip("."))]

    def _gathered(self, base: Path, asked: UsedTalks) -> Documents | None:
        """The very conversations; None where they are not to be had."""
        talks = conversations.dialogues(limit=asked.limit)
        found = gather(base, talks, runtime=self.device.runtime)
        every = found.documents
        there = UsedTalks(
            asked.limit,
            found.sha256(),
            tuple(one.domain for one in every),
            tuple(one.group for one in every),
            tuple(one.n_scored for one in every),
        )
        return found if there == asked else None

    def _read(
        self, logits: DocumentLogits, base: Path, asked: UsedTalks, drawn: Sequence[int]
    ) -> Iterator[Finding]:
        yield from self._one(logits, BASE, base, asked, drawn)
        for name, path in self.files.items():
            yield from self._one(logits, name, path, asked, drawn)

    def _one(
        self,
        logits: DocumentLogits,
        name: str,
        path: Path,
        asked: UsedTalks,
        drawn: Sequence[int],
    ) -> Iterator[Finding]:
        from quantkit.machine.memory import free_memory  # needs torch

        kind, runtime = (BASE if name == BASE else OURS), self.device.runtime
        measures: dict[str, Callable[[], DocumentResult]] = {
            OF_FILE: lambda: document_kl.measure(logits, path, runtime),
            OF_WEIGHTS: lambda: document_kl.measure_weights(
                logits, path, self.folder, runtime, memory=weights_room(free_memory())
            ),
        }
        for measure, take in measures.items():
            wanted = name, kind, measure
            claims = [t for t in self.receipt.talks if (t.file, t.kind, t.measure) == wanted]
            if not claims:
                continue
            title = _title(name, measure)
            there, here = self.receipt.engine.device, self.device.name
            other = other_device(title, there, here) if measure == OF_FILE else None
            result = measured_again(title, take, self.note, other)
            if isinstance(result, Finding):
                yield result
                continue
            yield from self._compared(title, measure, claims[0], result, asked, drawn)

    def _compared(
        self,
        title: str,
        measure: str,
        claim: Talks,
        result: DocumentResult,
        asked: UsedTalks,
        drawn: Sequence[int],
    ) -> Iterator[Finding]:
        limit = self.receipt.tolerance
        names = [f"conversation {i} ({asked.domains[i]})" for i in drawn]
        fewer = np.array([math.sqrt(_WINDOW / asked.n_scored[i]) for i in drawn])
        claimed = np.array([claim.kl[i] for i in drawn])
        again = np.array([one.kl.mean() for one in result.scores])
        allowed = (limit.kl + limit.kl_share * claimed) * fewer
        yield compared(title, names, claimed, again, allowed)
        if measure == OF_FILE:
            claimed = np.array([claim.top1[i] for i in drawn])
            again = np.array([one.same_top.mean() for one in result.scores])
            yield compared(f"{title}, equal tokens", names, claimed, again, limit.top1 * fewer)

    # ---- answers

    def answers(self, base: Path, drawn: Sequence[int]) -> list[Finding]:
        """Return whether the drawn answers are those of the models."""
        used = self.receipt.used_prompts
        by_name = {r.file: r for r in self.receipt.replies if r.kind in (BASE, OURS)}
        if used is None or not drawn or BASE not in by_name:
            return []
        if other := other_device(_ANSWERS, self.receipt.engine.device, self.device.name):
            return [other]
        self.note(f"the full-precision file on its answers to {len(drawn)} prompts")
        try:
            asked = self._asked(base, used)
            if asked is None:
                return [Finding(_ANSWERS, None, _OTHERS.format("prompts"))]
            ids = [asked.ids[i] for i in drawn]
            of_base = _some(by_name[BASE], drawn)
            finding, chosen = self._own(base, f"the original's {_ANSWERS}", ids, of_base)
        except EvaluationError as error:
            return [Finding(_ANSWERS, None, error.message.rstrip("."))]
        found = [finding]
        for name, path in self.files.items():
            if name in by_name and chosen is not None:
                found += self._beside(name, path, ids, _some(by_name[name], drawn), of_base, chosen)
        return found

    def _asked(self, base: Path, used: UsedPrompts) -> Asked | None:
        prompts = conversations.prompts(limit=used.n)
        asked = generation.ask(base, prompts, used.n_new, self.device.runtime)
        is_same = tuple(prompt.name for prompt in asked.prompts) == used.names
        return asked if is_same and asked.sha256() == used.sha256 else None

    def _own(
        self, path: Path, title: str, ids: Sequence[I32], claimed: Replies
    ) -> tuple[Finding, list[I32] | None]:
        """Whether claimed answers are what the model finds likeliest; and what it does, where they
        can be read at all.
        """
        with Model(path, self.device.runtime) as model:
            if not all(0 <= t < model.n_vocab for tokens in claimed.tokens for t in tokens):
                return Finding(title, False, "they have tokens that the model does not know"), None
            ends = model.ends()
            for tokens, ended, text in zip(
                claimed.tokens, claimed.ended, claimed.texts, strict=True
            ):
                said = tokens[:-1] if ended else tokens
                if (tokens[-1] in ends) != ended or not ends.isdisjoint(tokens[:-1]):
                    return Finding(title, False, "one ends elsewhere than it says"), None
                if model.text_of(said, special=True) != text:
                    return Finding(title, False, "a text is not that of its tokens"), None
            chosen = greedy.choices(model, ids, _answers(claimed))
            short = np.concatenate(greedy.shortfalls(model, ids, _answers(claimed)))
        mean, most = float(short.mean()), self.receipt.tolerance.tokens
        about = f"another token is likelier at {int((short > 0).sum())} of {len(short)}"
        about += f", by {mean:.2g} nats on average of all; close ties make up to {most:g}"
        return Finding(title, mean <= most, about), chosen

    def _beside(
        self,
        name: str,
        path: Path,
        ids: Sequence[I32],
        claimed: Replies,
        of_base: Replies,
        chosen: Sequence[I32],
    ) -> Iterator[Finding]:
        title = f"{name}, {_ANSWERS}"
        self.note(title)
        try:
            finding, _ = self._own(path, title, ids, claimed)
            yield finding
            with Model(path, self.device.runtime) as model:
                read = greedy.choices(model, ids, _answers(of_base))
        except EvaluationError as error:
            yield Finding(title, None, error.message.rstrip("."))
            return
        n, agreed = sum(map(len, chosen)), sum(generation.equal_choices(chosen, read))
        yield Finding(
            f"{name}, same next token on the original's answers",
            abs(agreed - sum(claimed.agreed)) <= self._most(n),
            "",
            sum(claimed.agreed) / n,
            agreed / n,
            self._most(n) / n,
        )

    def _most(self, n: int) -> float:
        """How many of `n` equal tokens may be others, as in a window of so many."""
        return self.receipt.tolerance.top1 * math.sqrt(_WINDOW * n)


def _some(found: Replies, drawn: Sequence[int]) -> Replies:
    return replace(
        found,
        tokens=tuple(found.tokens[i] for i in drawn),
        ended=tuple(found.ended[i] for i in drawn),
        texts=tuple(found.texts[i] for i in drawn),
        agreed=tuple(found.agreed[i] for i in drawn),
    )


def _answers(found: Replies) -> list[Answer]:
    return [Answer(t, e) for t, e in zip(found.tokens, found.ended, strict=True)]


def _title(name: str, measure: str) -> str:
    if name == BASE:
        return "the engine's floor in conversations"
    return f"{name}, {'KL' if measure == OF_FILE else 'weight KL'} in conversations"
