"""Choose what is measured again. Who verifies chooses, at random: whoever claims figures cannot
know which of them will be looked at.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from quantkit.evidence.receipt.make import LONG
from quantkit.evidence.receipt.schema import Receipt

N_WINDOWS = 8  # of all texts together: half a minute for each file of a small model
N_ITEMS = 40
N_TALKS, N_PROMPTS = 6, 8  # conversations, and answers that are read


@dataclass(frozen=True)
class Drawn:
    """Numbers of windows by context and text, of items by task, of conversations and of prompts;
    what it is in words.
    """

    windows: Mapping[int, Mapping[str, tuple[int, ...]]]
    items: Mapping[str, tuple[int, ...]]
    talks: tuple[int, ...]
    prompts: tuple[int, ...]
    sentence: str

    @property
    def is_empty(self) -> bool:
        return not (self.windows or self.items or self.talks or self.prompts)


def everything(receipt: Receipt, texts: Collection[str]) -> Drawn:
    """Return all windows of these texts, and all items."""
    windows: dict[int, dict[str, tuple[int, ...]]] = {}
    for tokens in receipt.tokens:
        if tokens.text in texts:
            cut = windows.setdefault(tokens.n_ctx, {})
            cut[tokens.text] = tuple(range(tokens.n_windows))
    items = {a.task: tuple(range(len(a.picks))) for a in receipt.answers}
    return Drawn(
        windows,
        items,
        tuple(range(_n_talks(receipt))),
        tuple(range(_n_prompts(receipt))),
        "Measured again: every window, item, conversation and answer of our files.",
    )


def _n_talks(receipt: Receipt) -> int:
    return len(receipt.used_talks.n_scored) if receipt.used_talks else 0


def _n_prompts(receipt: Receipt) -> int:
    return len(receipt.used_prompts.names) if receipt.used_prompts else 0


def sample(receipt: Receipt, texts: Collection[str], n_windows: int, seed: int) -> Drawn:
    """Return `n_windows` windows of these texts' shortest context, some items of each task, some
    conversations and some answers.
    """
    chance = random.Random(seed)
    short = [t for t in receipt.tokens if t.text != LONG and t.text in texts]
    n_ctx = min((t.n_ctx for t in short), default=0)
    all_windows = [(t.text, i) for t in short if t.n_ctx == n_ctx for i in range(t.n_windows)]
    chosen = sorted(chance.sample(all_windows, min(n_windows, len(all_windows))))
    windows = {name: tuple(i for n, i in chosen if n == name) for name in dict(chosen)}
    items, counts = {}, {a.task: len(a.picks) for a in receipt.answers}
    for task, n in counts.items():
        items[task] = tuple(sorted(chance.sample(range(n), min(N_ITEMS, n))))
    n_items = sum(map(len, items.values()))
    n_talks, n_prompts = _n_talks(receipt), _n_prompts(receipt)
    talks = tuple(sorted(chance.sample(range(n_talks), min(N_TALKS, n_talks))))
    prompts = tuple(sorted(chance.sample(range(n_prompts), min(N_PROMPTS, n_prompts))))
    said = f"Measured again: {len(chosen)} of {len(all_windows)} windows of {n_ctx} tokens"
    for n, n_all, what in (
        (n_items, sum(counts.values()), "items"),
        (len(talks), n_talks, "conversations"),
        (len(prompts), n_prompts, "answers"),
    ):
        said += f", {n} of {n_all} {what}" if n_all else ""
    said += f"; drawn at random (--seed {seed}), --full measures all."
    return Drawn({n_ctx: windows} if windows else {}, items, talks, prompts, said)
