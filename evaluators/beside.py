"""The figures of a file's answers beside the base's, out of the tokens and texts of both."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.chat import I32
from evaluators.conversations import Prompt
from evaluators.figures import AnswersBeside, Estimate, Share, SideBySide, Thinking
from evaluators.greedy import Answer
from evaluators.replies import (
    Call,
    first_difference,
    fits,
    loops,
    split_thought,
    tool_calls,
    valid_json,
)
from evaluators.stats import ratio_interval, sign_test, wilson

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """Prompts as tokens, as the base's chat template renders them. `n_left_out` are those that it
    cannot render or that do not fit the model's context.
    """

    prompts: tuple[Prompt, ...]
    ids: tuple[I32, ...]
    begun: tuple[str, ...]  # what a template has written of each answer already: a think tag
    n_new: int
    asked: str
    reason: str
    n_left_out: int

    def sha256(self) -> str:
        """Hash of all token ids and the length of answers."""
        digest = hashlib.sha256(str(self.n_new).encode())
        for ids in self.ids:
            digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer and its text, special tokens included."""

    answer: Answer
    text: str


def compare_replies(
    asked: Asked, pairs: Sequence[tuple[Reply, Reply]], agreed: Sequence[int]
) -> AnswersBeside:
    """Return the figures of answers, the base's and the file's to each prompt; `agreed` are the
    tokens of each of the base's answers that the file would choose, too.
    """
    n_same, n_base, n_file, parted = [], [], [], []
    for mine, theirs in pairs:
        at = first_difference(mine.answer.tokens, theirs.answer.tokens)
        parted.append(at is not None)
        n_same.append(len(mine.answer.tokens) if at is None else at)
        n_base.append(len(mine.answer.tokens))
        n_file.append(len(theirs.answer.tokens))
    texts = [
        (begun + mine.text, begun + theirs.text)
        for begun, (mine, theirs) in zip(asked.begun, pairs, strict=True)
    ]
    calls = [
        (_calls(mine, prompt), _calls(theirs, prompt))
        for prompt, (mine, theirs) in zip(asked.prompts, texts, strict=True)
        if prompt.talk.tools
    ]
    made = [(mine, theirs) for mine, theirs in calls if mine]
    structured = [
        (valid_json(mine, prompt.json_keys), valid_json(theirs, prompt.json_keys))
        for prompt, (mine, theirs) in zip(asked.prompts, texts, strict=True)
        if prompt.json_keys is not None
    ]
    return AnswersBeside(
        n_prompts=len(pairs),
        n_left_out=asked.n_left_out,
        n_new=asked.n_new,
        n_tokens=sum(n_file),
        prompts_sha256=asked.sha256(),
        asked=asked.asked,
        reason=asked.reason or None,
        identical=_share(not differs for differs in parted),
        before_difference=ratio(np.array(n_same, float), np.ones(len(pairs))),
        agreement=ratio(np.array(agreed, float), np.array(n_base, float), most=1.0),
        length=ratio(np.array(n_file, float), np.array(n_base, float)),
        unfinished=_both(pairs, lambda reply: not reply.answer.ended),
        loops=_both(pairs, lambda reply: not reply.answer.ended and loops(reply.answer.tokens)),
        tool_calls=_both(calls, bool) if calls else None,
        same_calls=_share(mine == theirs for mine, theirs in made) if made else None,
        json=_both(structured, bool) if structured else None,
        thinking=_thinking(texts),
    )


def _calls(text: str, prompt: Prompt) -> tuple[Call, ...]:
    """The calls that an answer makes, if all of them are of tools that were given."""
    found = tool_calls(text) or ()
    return found if all(fits(call, prompt.talk.tools) for call in found) else ()


def _thinking(texts: Sequence[tuple[str, str]]) -> Thinking | None:
    """How the thinking compares, of answers where the base thinks."""
    thoughts = [(split_thought(mine), split_thought(theirs)) for mine, theirs in texts]
    thoughts = [pair for pair in thoughts if pair[0][0].strip()]
    if not thoughts:
        return None
    lengths = np.array([[len(mine[0]), len(theirs[0])] for mine, theirs in thoughts], float)
    return Thinking(
        n=len(thoughts),
        length=ratio(lengths[:, 1], lengths[:, 0]),
        finished=_both(thoughts, lambda thought: thought[2]),
    )


def _share(said: Any) -> Share:
    values = list(said)
    n_yes, n = sum(values), len(values)
    return Share(n_yes / n if n else float("nan"), wilson(n_yes, n), n_yes, n)


def _both(pairs: Sequence[tuple[Any, Any]], is_so: Callable[[Any], bool]) -> SideBySide:
    said = [(bool(is_so(mine)), bool(is_so(theirs))) for mine, theirs in pairs]
    only_mine = sum(a and not b for a, b in said)
    only_theirs = sum(b and not a for a, b in said)
    p_value = sign_test(only_mine, only_theirs)
    return SideBySide(_share(a for a, _ in said), _share(b for _, b in said), p_value)


def ratio(sums: F64, counts: F64, most: float = math.inf) -> Estimate:
    """Return a ratio of sums over prompts, at most `most`, with its interval."""
    ci95 = ratio_interval(sums, counts, most)
    return Estimate(float(sums.sum() / counts.sum()), ci95, len(sums))
