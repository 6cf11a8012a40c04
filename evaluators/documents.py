"""Documents to score token by token: answers behind their conversations, as a chat template renders
them, and the ends of long texts.

Of a conversation the assistant's last answer is scored, up to the token that ends it: what a file
is used for. Of a long document the last 512 tokens are, so that all of its context is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.chat import I32, Chat, Gone
from evaluators.conversations import Dialogue
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import CPU, Model, Runtime

LONG = {4096: 4, 16_384: 2, 32_768: 1}  # tokens of a long document -> how many, where they are
SCORED_LAST = 512  # tokens of a long document


@dataclass(frozen=True)
class Document:
    """Token ids [n]; the logits at positions first .. n - 2 are scored. It counts for its `domain`,
    and for `group` if there is one.
    """

    domain: str
    group: str | None
    ids: I32
    first: int

    @property
    def n_scored(self) -> int:
        return len(self.ids) - 1 - self.first


@dataclass(frozen=True)
class Documents:
    """What is scored. `left_out` are domains, or parts of them, that the model cannot be given,
    with the reason.
    """

    documents: tuple[Document, ...]
    asked: str
    reason: str
    left_out: dict[str, str]

    def sha256(self) -> str:
        """Hash of all token ids and of what is scored."""
        digest = hashlib.sha256()
        for one in self.documents:
            digest.update(f"{len(one.ids)} {one.first} ".encode())
            digest.update(one.ids.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def n_scored(self) -> int:
        return sum(one.n_scored for one in self.documents)

    @property
    def n_tokens(self) -> int:
        return sum(len(one.ids) for one in self.documents)


ALL = "all"  # conversations together, whatever their domain


def names_of(domain: str, group: str | None) -> tuple[str, ...]:
    """Return what a document counts for: its domain, its group, and with all conversations where it
    is one.
    """
    together = () if domain.endswith(" tokens") else (ALL,)
    return (domain, *((group,) if group else ()), *together)


def long_domain(n_tokens: int) -> str:
    """Return the name of the domain of long documents."""
    return f"{n_tokens:,} tokens"


def gather(
    base: Path | str,
    dialogues: Sequence[Dialogue],
    long_text: str = "",
    lengths: Sequence[int] = (),
    runtime: Runtime = CPU,
) -> Documents:
    """Return documents as the base's template renders them and its tokenizer cuts them; as plain
    text where it has no template that can be used, which `reason` then explains.

    Args:
        long_text: is cut into documents of `lengths` tokens, from its start for each length.

    Raises:
        EvaluationError: a broken base, or one that no document can be given to.
    """
    without = ""
    for _ in range(2):
        with Model(base, runtime) as model:
            try:
                return _gathered(Chat(model, without), model, dialogues, long_text, lengths)
            except Gone as error:  # the template ended llama.cpp's process
                without = error.message
    raise EvaluationError(f"{base} cannot be asked: {without}", "Download or make it again.")


def _gathered(
    chat: Chat,
    model: Model,
    dialogues: Sequence[Dialogue],
    long_text: str,
    lengths: Sequence[int],
) -> Documents:
    found: list[Document] = []
    left_out: dict[str, str] = {}
    for dialogue in dialogues:
        try:
            before, reply = chat.with_reply(dialogue.talk)
        except Gone:
            raise
        except EvaluationError as error:
            left_out[dialogue.domain] = error.message
            continue
        ids = np.concatenate([before, reply])
        if len(ids) > model.n_ctx_train:
            left_out[dialogue.domain] = f"The model was trained for {model.n_ctx_train:,} tokens."
        elif len(reply):
            found.append(Document(dialogue.domain, dialogue.group, ids, len(before) - 1))
    text_ids = model.tokenize(long_text) if lengths and long_text else np.empty(0, np.int32)
    for n in lengths:
        n_documents = min(LONG.get(n, 1), len(text_ids) // n)
        if n > model.n_ctx_train:
            left_out[long_domain(n)] = f"The model was trained for {model.n_ctx_train:,} tokens."
        elif n_documents == 0:
            left_out[long_domain(n)] = f"The text has {len(text_ids):,} tokens."
        for i in range(n_documents if n <= model.n_ctx_train else 0):
            ids = text_ids[i * n : (i + 1) * n].copy()
            if model.adds_bos:
                ids[0] = model.bos
            first = max(n // 2, n - 1 - SCORED_LAST)
            found.append(Document(long_domain(n), None, ids, first))
    if not found:
        raise EvaluationError(
            f"No document can be given to {model.path}: {next(iter(left_out.values()), '')}",
            "Use shorter documents.",
        )
    return Documents(tuple(found), chat.asked, chat.reason, left_out)
