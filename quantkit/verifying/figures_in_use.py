"""Hold what report.json says of conversations and answers against the receipt. No file is
opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evaluators import conversations
from evaluators.beside import Asked, Reply, compare_replies
from evaluators.documents import names_of
from evaluators.figures import AnswersBeside, Estimate
from evaluators.greedy import Answer
from evaluators.stats import ratio_interval
from quantkit.evidence.receipt.schema import (
    BASE,
    OF_FILE,
    OF_WEIGHTS,
    Receipt,
    Replies,
    Talks,
    UsedTalks,
)
from quantkit.evidence.report import Report, Row
from quantkit.evidence.report.schema import to_json
from quantkit.verifying.findings import Finding

_TITLE = "answers of report.json"
_ROUNDING = 1e-5  # relative: the receipt has eight digits, and intervals are differences

Pair = tuple[str, float | None, float | None]


# ---- conversations


def pairs(receipt: Receipt, row: Row) -> Iterator[Pair]:
    """Yield a row's figures on conversations, each with what the receipt's come to."""
    follows = _by_domain(receipt, row.name, row.kind, OF_FILE)
    claimed = row.conversations or {}
    yield "the number of kinds of conversation", len(claimed), len(follows)
    for domain, found in claimed.items():
        if domain in follows:
            kl, top1 = follows[domain]
            yield from _estimates(f"the KL in {domain}", found.kl, kl)
            yield from _estimates(f"equal tokens in {domain}", found.top1, top1)
    of_weights = _by_domain(receipt, row.name, row.kind, OF_WEIGHTS)
    yield from _weights(row.weight_conversations or {}, of_weights, "weight KL")


def are_same(receipt: Receipt, measured: Report) -> bool:
    """Return whether receipt and report are of the same conversations."""
    known, asked = measured.documents, receipt.used_talks
    if known is None or asked is None:
        return known is asked
    return (known.sha256, known.n, known.n_scored) == (
        *(asked.sha256, len(asked.n_scored)),
        sum(asked.n_scored),
    )


def floor(receipt: Receipt, measured: Report) -> Iterator[Pair]:
    """Yield the figures of the engine's floor, in the same way as `pairs`."""
    claimed = {domain: found.kl for domain, found in (measured.base.floor or {}).items()}
    yield from _weights(claimed, _by_domain(receipt, BASE, BASE, OF_WEIGHTS), "floor")


def _weights(
    claimed: dict[str, Estimate], follows: dict[str, tuple[Estimate, Estimate]], what: str
) -> Iterator[Pair]:
    yield f"the number of kinds of conversation with a {what}", len(claimed), len(follows)
    for domain, found in claimed.items():
        if domain in follows:
            yield from _estimates(f"the {what} in {domain}", found, follows[domain][0])


def _estimates(what: str, claimed: Estimate, follows: Estimate) -> Iterator[Pair]:
    yield what, claimed.value, follows.value
    for end, a, b in zip(
        ("lower", "upper"),
        claimed.ci95 or (None, None),
        follows.ci95 or (None, None),
        strict=True,
    ):
        yield f"the {end} end of {what}", a, b


def _by_domain(
    receipt: Receipt, name: str, kind: str, measure: str
) -> dict[str, tuple[Estimate, Estimate]]:
    """Mean KL and equal tokens by domain, out of the means of single conversations."""
    wanted = name, kind, measure
    found = next((t for t in receipt.talks if (t.file, t.kind, t.measure) == wanted), None)
    asked = receipt.used_talks
    return {} if found is None or asked is None else _estimated(asked, found)


def _estimated(asked: UsedTalks, found: Talks) -> dict[str, tuple[Estimate, Estimate]]:
    members: dict[str, list[int]] = {}
    for i, (domain, group) in enumerate(zip(asked.domains, asked.groups, strict=True)):
        for name in names_of(domain, group):
            members.setdefault(name, []).append(i)
    counts = np.array(asked.n_scored, float)

    def estimate(column: Sequence[float], which: list[int], most: float) -> Estimate:
        sums = np.array(column, float)[which] * counts[which]
        value = float(sums.sum() / counts[which].sum())
        return Estimate(value, ratio_interval(sums, counts[which], most), len(which))

    return {
        name: (estimate(found.kl, which, math.inf), estimate(found.top1, which, 1.0))
        for name, which in members.items()
    }


# ---- answers


def check_answers(receipt: Receipt, measured: Report) -> list[Finding]:
    """Return whether the figures of answers follow from the answers themselves."""
    claimed = {(row.name, row.kind): row.answers for row in measured.rows if row.answers}
    there = {(r.file, r.kind): r for r in receipt.replies if r.kind != BASE}
    if not claimed and not there:
        return []
    if claimed.keys() != there.keys():
        return [Finding(_TITLE, False, "the receipt has answers of other files")]
    base = next((r for r in receipt.replies if r.kind == BASE), None)
    asked = _asked(receipt)
    if base is None or receipt.used_prompts is None:
        return [Finding(_TITLE, False, "the receipt has no answers of the original")]
    if asked is None:
        return [Finding(_TITLE, None, "this version of quantkit has other prompts")]
    wrong = []
    for key, figures in claimed.items():
        follows = compare_replies(asked, _both(base, there[key]), there[key].agreed)
        follows = replace(follows, prompts_sha256=receipt.used_prompts.sha256)
        if names := _differing(figures, follows):
            wrong.append(f"{', '.join(names)} of {key[0]}")
    about = f"they do not follow from the receipt's: {wrong[0]}" if wrong else ""
    return [Finding(_TITLE, not wrong, about or "they follow from the answers in the receipt")]


def _asked(receipt: Receipt) -> Asked | None:
    """The prompts by their names, without tokens; None where this version has others."""
    used = receipt.used_prompts
    if used is None:
        return None
    known = {prompt.name: prompt for prompt in conversations.prompts(limit=used.n)}
    if not known.keys() >= set(used.names):
        return None
    prompts = tuple(known[name] for name in used.names)
    left_out = used.n - len(prompts)
    return Asked(prompts, (), used.begun, used.n_new, used.asked, used.reason, left_out)


def _both(base: Replies, file: Replies) -> list[tuple[Reply, Reply]]:
    return list(zip(_replies(base), _replies(file), strict=True))


def _replies(found: Replies) -> list[Reply]:
    rows = zip(found.tokens, found.ended, found.texts, strict=True)
    return [Reply(Answer(tokens, ended), text) for tokens, ended, text in rows]


def _differing(claimed: AnswersBeside, follows: AnswersBeside) -> list[str]:
    a, b = to_json(claimed), to_json(follows)
    return [name for name in {**a, **b} if not _alike(a.get(name), b.get(name))]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return all(_alike(a.get(name), b.get(name)) for name in {**a, **b})
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=1e-9)
    return bool(a == b)
