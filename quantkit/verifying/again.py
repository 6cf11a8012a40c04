"""Measure files again on the windows and items that were drawn, and compare with the claims.

KL, -log p and equal tokens are compared window by window and as the mean of all: of the very same
tokens, so that only rounding is between them (`evidence.receipt.limits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from evaluators import choice_items, kl, zeroshot
from evaluators.base_logits import BaseLogits
from evaluators.choice_items import TaskItems
from evaluators.errors import EvaluationError
from evaluators.kl import KLResult
from evaluators.llama_runtime import Model
from evaluators.windows import cut_windows
from evaluators.zeroshot import ZeroShotResult
from quantkit.evidence.devices import Device
from quantkit.evidence.receipt import Receipt
from quantkit.evidence.receipt.schema import OF_FILE, OF_WEIGHTS, Answers
from quantkit.evidence.report.schema import OURS
from quantkit.llamacpp.place import weights_room
from quantkit.verifying.draw import Drawn
from quantkit.verifying.findings import Finding, compared, other_device

_Result = TypeVar("_Result")


def measured_again(
    title: str, take: Callable[[], _Result], note: Callable[[str], None], elsewhere: Finding | None
) -> _Result | Finding:
    """Return what a measure comes to, or the finding that it could not be taken: `elsewhere` where
    it depends on the device and this is another (`other_device`).
    """
    if elsewhere is not None:
        return elsewhere
    note(title)
    try:
        return take()
    except EvaluationError as error:
        return Finding(title, None, error.message.rstrip("."))


@dataclass(frozen=True)
class Again:
    """Measures the files of one receipt. `files` are ours by name, `texts` those at hand, `folder`
    has room for weights at F16; `note` is told what is being done.
    """

    receipt: Receipt
    files: Mapping[str, Path]
    texts: Mapping[str, str]
    device: Device
    folder: Path
    note: Callable[[str], None]
    items: Path | None = None  # in place of those that whoever made the file was given

    # ---- tokens

    def check_tokens(self) -> list[Finding]:
        """Return whether every file's own tokenizer gives the tokens that were measured on."""
        return [self._tokens(name, path) for name, path in self.files.items()]

    def _tokens(self, name: str, path: Path) -> Finding:
        title = f"tokens of {name}"
        wrong, n = [], 0
        try:
            with Model(path, self.device.on_cpu) as model:
                for t in self.receipt.tokens:
                    if t.text in self.texts:
                        text = self.texts[t.text]
                        cut = cut_windows(model, text, n_ctx=t.n_ctx, max_windows=t.n_windows)
                        n += 1
                        if cut.n_windows != t.n_windows or cut.sha256() != t.sha256:
                            wrong.append(t.text)
        except EvaluationError as error:
            return Finding(title, None, error.message.rstrip("."))
        if wrong:
            return Finding(title, False, f"the texts give others: {', '.join(wrong)}")
        return Finding(title, True if n else None, f"{n} texts give the tokens of the receipt")

    # ---- windows

    def measure(self, base: Path, drawn: Drawn) -> list[Finding]:
        """Return what the drawn windows and items come to. A file that cannot be measured is a
        finding that is none.
        """
        found: list[Finding] = []
        for n_ctx, picked in drawn.windows.items():
            self.note(f"the full-precision file on {_count(picked)} windows of {n_ctx} tokens")
            texts = {name: self.texts[name] for name in picked}
            try:
                with BaseLogits.compute(
                    base, texts, n_ctx, runtime=self.device.runtime, picked=picked
                ) as logits:
                    for name, path in self.files.items():
                        found += self._windows(logits, name, path, n_ctx, picked)
            except EvaluationError as error:
                about = error.message.rstrip(".")
                found.append(Finding(f"KL in windows of {n_ctx} tokens", None, about))
        return [*found, *self._tasks(base, drawn)]

    def _windows(
        self,
        logits: BaseLogits,
        name: str,
        path: Path,
        n_ctx: int,
        picked: Mapping[str, Sequence[int]],
    ) -> Iterator[Finding]:
        from quantkit.machine.memory import free_memory  # needs torch

        runtime, memory = self.device.runtime, weights_room(free_memory())
        measures: dict[str, Callable[[], KLResult]] = {
            OF_FILE: lambda: kl.measure(logits, path, runtime),
            OF_WEIGHTS: lambda: kl.measure_weights(
                logits, path, self.folder, runtime, memory=memory
            ),
        }
        for measure, take in measures.items():
            pairs = self._claims(name, measure, n_ctx, picked)
            if not pairs:
                continue
            title = f"{name}, {_TITLES[measure]}"
            there, here = self.receipt.engine.device, self.device.name
            other = other_device(title, there, here) if measure == OF_FILE else None
            result = measured_again(title, take, self.note, other)
            if isinstance(result, Finding):
                yield result
                continue
            if not result.same_tokens:
                yield Finding(title, False, "the file's tokenizer is not the original's")
            yield from self._compared(title, measure, pairs, result, picked)

    def _claims(
        self, name: str, measure: str, n_ctx: int, picked: Mapping[str, Sequence[int]]
    ) -> dict[tuple[str, int], dict[str, float]]:
        """What is claimed of the drawn windows: of weights fewer were measured."""
        found = {}
        for w in self.receipt.windows:
            if (w.file, w.kind, w.measure, w.n_ctx) == (name, OURS, measure, n_ctx):
                for i in picked.get(w.text, ()):
                    if i < len(w.means.kl):
                        found[w.text, i] = {c: column[i] for c, column in vars(w.means).items()}
        return found

    def _compared(
        self,
        title: str,
        measure: str,
        claims: Mapping[tuple[str, int], Mapping[str, float]],
        result: KLResult,
        picked: Mapping[str, Sequence[int]],
    ) -> Iterator[Finding]:
        means = {text: scores.by_window() for text, scores in result.tokens.items()}
        limit = self.receipt.tolerance
        for column, (words, each) in {
            "kl": ("", lambda c: limit.kl + limit.kl_share * c),
            "nll": (", -log p", lambda _: limit.nll),
            "base_nll": (", -log p of the original", lambda _: limit.nll),
            "top1": (", equal tokens", lambda _: limit.top1),
        }.items():
            if measure == OF_WEIGHTS and column != "kl":
                continue
            claimed = np.array([row[column] for row in claims.values()])
            again = np.array(
                [getattr(means[text], column)[picked[text].index(i)] for text, i in claims]
            )
            allowed = np.array([each(value) for value in claimed])
            names = [f"window {i} of {text}" for text, i in claims]
            yield compared(f"{title}{words}", names, claimed, again, allowed)

    # ---- answers

    def _tasks(self, base: Path, drawn: Drawn) -> Iterator[Finding]:
        by_task = {a.task: a for a in self.receipt.answers}
        for task, answers in by_task.items():
            try:
                items = self._items(answers)
                chosen = drawn.items[task]
                some = replace(items, items=tuple(items.items[i] for i in chosen))
                self.note(f"the full-precision file's answers to {len(chosen)} items of {task}")
                of_base = zeroshot.run(base, some, runtime=self.device.runtime)
            except EvaluationError as error:
                yield Finding(f"answers to {task}", None, error.message.rstrip("."))
                continue
            yield self._picks(
                f"the original's answers to {task}", answers.base_picks, of_base, chosen
            )
            for claimed in self.receipt.answers:
                if claimed.task == task and claimed.kind == OURS and claimed.file in self.files:
                    title = f"{claimed.file}, answers to {task}"
                    self.note(title)
                    try:
                        path = self.files[claimed.file]
                        result = zeroshot.run(path, some, runtime=self.device.runtime)
                    except EvaluationError as error:
                        yield Finding(title, None, error.message.rstrip("."))
                        continue
                    yield self._picks(title, claimed.picks, result, chosen)

    def _items(self, answers: Answers) -> TaskItems:
        """The very items. Raises EvaluationError when they are not at hand."""
        n = len(answers.picks)
        if answers.is_given and self.items is None:
            raise EvaluationError(f"The items were given as {answers.source}.", "Use --tasks.")
        items = (
            choice_items.load("choices", data=self.items)
            if answers.is_given
            else choice_items.load(answers.task, limit=n)
        )
        if items.sha256() != answers.items_sha256:
            raise EvaluationError("The items are not those that were answered.", "Use --tasks.")
        return items

    def _picks(
        self, title: str, claimed: Sequence[int], result: ZeroShotResult, chosen: Sequence[int]
    ) -> Finding:
        """The share of the items whose answer is the claimed one."""
        equal = [claimed[i] == pick for i, pick in zip(chosen, result.picks["acc"], strict=True)]
        expected = self.receipt.tolerance.picks * len(equal)
        most = int(expected + 2 * math.sqrt(expected))  # of a sample some more may be close ties
        n_other = len(equal) - sum(equal)
        about = f"{n_other} of {len(equal)} answers are others, {most} may be"
        return Finding(title, n_other <= most, about)


_TITLES = {OF_FILE: "KL", OF_WEIGHTS: "weight KL"}


def _count(picked: Mapping[str, Sequence[int]]) -> int:
    return sum(map(len, picked.values()))
