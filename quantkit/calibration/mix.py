"""Read the texts of a calibration spec: every part of the mix as documents, with its share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from quantkit import hub
from quantkit.calibration import files, knowledge, sampling, sources
from quantkit.calibration.documents import (
    EVAL_TOKENS,
    LANGUAGE_TOKENS,
    N_CTX,
    PARTS,
    Domain,
    pack,
    split,
    up_to,
    without,
)
from quantkit.config.calibration import (
    AUTO,
    HUB_TEXTS,
    WRITTEN,
    Request,
    language_of,
    parse_spec,
    parts_of,
    shown,
)
from quantkit.config.languages import LANGUAGES, sentences
from quantkit.errors import QuantkitError
from quantkit.llamacpp.chat import ChatTemplate
from quantkit.ranks.group import ALONE, Ranks

_CHARACTERS_PER_TOKEN = 3  # a cautious guess of how much text to read
_NEW_TOKENS = 192  # that the model writes after an opening
_ADDED = ("docs", "code")  # to given text that is too short
_SHORT = 200_000  # characters: what has more is long enough

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Mix:
    """The texts with shares that sum to 1, a sentence on where they come from, and how many bits
    the model needs in each language that was asked for, over those that it needs in English.
    """

    domains: tuple[tuple[Domain, float], ...]
    note: str
    languages: dict[str, float]


@dataclass(frozen=True)
class Reader:
    """The model and tokenizer that texts are read and written with."""

    model: PreTrainedModel
    tokenizer: Any
    token: str | None  # of the Hub
    seed: int
    progress: Progress
    is_streamed: bool = False  # every token that the model writes would read all of its weights
    kept: Path | None = None  # what the model wrote before a kill
    not_rendered: list[str] = field(default_factory=list)  # why a conversation was left plain text
    ranks: Ranks = ALONE

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def _why_no_chat(self) -> str:
        """Why conversations stay plain text: tried once, not for every dialogue."""
        return sampling.why_no_chat(self._chat)

    def mix(self, spec: str, n_tokens: int, n_eval: int) -> Mix:
        """Return the texts of a spec: about `n_tokens` tokens to calibrate on, in all, and of each
        text some more to hold `n_eval` out. Raises QuantkitError when a text cannot be read or none
        is left.
        """
        requests, note = self._requests(spec)
        requests, known, said = self._in_known_languages(requests)
        note += said
        requests, said = self._without_written(requests)
        note += said
        total = sum(r.weight for r in requests)
        if any(r.name == "dialogue" for r in requests) and self._why_no_chat:
            note += f"; no dialogue, because {self._why_no_chat}"
            requests = tuple(r for r in requests if r.name != "dialogue")
        wanted: list[tuple[Request, int]] = []
        for request in requests:
            beside = n_eval if request.language is None else min(n_eval, LANGUAGE_TOKENS)
            share = request.weight / total
            wanted.append((request, int(share * n_tokens / (1 - PARTS["eval"])) + beside))
        domains: list[tuple[Domain, float]] = []
        seen: set[str] = set()
        may_replace = parse_spec(spec)[0].name == AUTO
        found, remarks = self.read(wanted, may_replace)
        for request, domain in zip(requests, found, strict=True):
            if may_replace and not domain.documents:
                continue  # nothing was left to replace it with: the others have its share
            domains.append((without(domain, seen), request.weight / total))
            seen |= set(domain.documents)
        if self.not_rendered:
            n, why = len(self.not_rendered), self.not_rendered[0].rstrip(".")
            note += f"; {n:,} conversations are plain text ({why})"
        if not domains:
            raise QuantkitError("No calibration text is left.", "Choose another --calibration.")
        if any(request.is_file for request in requests) and not self._is_enough(domains):
            remarks.append(
                "the given text is too short, so CPython's documentation and code follow"
            )
            added, _ = self.read([(Request(name, 1), n_tokens + n_eval) for name in _ADDED])
            domains += [(without(domain, seen), 1 / len(_ADDED)) for domain in added]
        note += "".join(f"; {remark}" for remark in remarks)
        left = sum(weight for _, weight in domains)
        return Mix(tuple((domain, weight / left) for domain, weight in domains), note, known)

    def _is_enough(self, domains: Sequence[tuple[Domain, float]]) -> bool:
        """Whether there is a sequence for every part."""
        if sum(len(text) for domain, _ in domains for text in domain.documents) > _SHORT:
            return True
        parts = [split(domain, self.seed) for domain, _ in domains]
        return all(
            any(len(pack(part[name], self.tokenizer, 1, N_CTX)) for part in parts)
            for name in ("train", "heldout")
        ) and any(
            len(self.tokenizer("\n\n".join(part["eval"]), verbose=False).input_ids) >= EVAL_TOKENS
            for part in parts
        )

    def _requests(self, spec: str) -> tuple[tuple[Request, ...], str]:
        requests = parse_spec(spec)
        if requests[0].name != AUTO:
            return requests, f"calibration text as given: {shown(spec)}"
        reason = hub.why_offline(self.token)
        if reason:
            return tuple(parts_of("builtin")), f"built-in text, because {reason}"
        return tuple(parts_of("hub")), "the Hub mix, because the Hub answers"

    def _in_known_languages(
        self, requests: Sequence[Request]
    ) -> tuple[tuple[Request, ...], dict[str, float], str]:
        """The requests without a mix's languages that the model does not know; what it needs in
        each, and what is to be said of it.
        """
        if not any(r.language for r in requests):
            return tuple(requests), {}, ""
        bits = knowledge.bits_by_language(self.model, self.tokenizer)
        unknown = [
            r for r in requests if r.if_known and bits[str(r.language)] > knowledge.MOST_BITS
        ]
        kept = tuple(r for r in requests if r not in unknown)
        said = ""
        if unknown:
            names = ", ".join(LANGUAGES[str(r.language)].name for r in unknown)
            said = (
                f"; left out {names}, where the model needs more than {knowledge.MOST_BITS} bits"
                f" for eight sentences that take {bits['en']:.0f} in English"
            )
        return (
            kept,
            {r.language: bits[r.language] / bits["en"] for r in requests if r.language},
            said,
        )

    def _without_written(self, requests: Sequence[Request]) -> tuple[tuple[Request, ...], str]:
        """The requests without text that a streamed model would have to write, where there is any
        other; what is to be said of it.
        """
        read = tuple(r for r in requests if r.name not in WRITTEN)
        if not self.is_streamed or not read or len(read) == len(requests):
            return tuple(requests), ""
        return read, "; no text written by the model, which is larger than half of the memory"

    def read(
        self, wanted: Sequence[tuple[Request, int]], may_replace: bool = False
    ) -> tuple[list[Domain], list[str]]:
        """Read texts of files, of the Hub, of CPython and of the model's own, each with about so
        many tokens. With `may_replace` a text of the Hub that does not come is CPython's
        documentation instead, empty once all of that is used. Return them, and clauses on what is
        not as it was asked for.
        """
        texts: dict[int, Domain] = {}
        used: set[str] = set()
        remarks: list[str] = []
        for i, (request, n_tokens) in enumerate(wanted):
            if request.is_file:
                texts[i], more = _file(Path(request.name), n_tokens)
                remarks += more
            elif request.name not in WRITTEN:
                n_characters = 2 * n_tokens * _CHARACTERS_PER_TOKEN
                try:
                    texts[i] = self._of_others(request.name, n_characters)
                except QuantkitError as error:
                    if not may_replace:
                        raise
                    texts[i] = self._instead(used, n_characters)
                    used |= set(texts[i].documents)
                    what = "Python's documentation" if texts[i].documents else "nothing"
                    remarks.append(f"{what} instead of {request.name}: {_why(error)}")
        # Last, and all together: it takes longest, and the others may be missing.
        left = [i for i in range(len(wanted)) if i not in texts]
        written = self._written([(wanted[i][0].name, wanted[i][1]) for i in left])
        for i, documents in zip(left, written, strict=True):
            name = wanted[i][0].name
            texts[i] = sources.domain(name, "sampled from the model itself", documents)
        return [texts[i] for i in range(len(wanted))], remarks

    def _of_others(self, name: str, n_characters: int) -> Domain:
        """A text of CPython's, or of the Hub."""
        builtin = sources.builtin_text(name, n_characters)
        if builtin is not None:
            return builtin
        texts = sources.hub_text(name, n_characters, self.token, self._rendered)
        return sources.domain(name, HUB_TEXTS[name].repo, texts)

    def _instead(self, used: Container[str], n_characters: int) -> Domain:
        """The documentation that does not stand in for other texts already."""
        whole = self._of_others(_ADDED[0], sys.maxsize)
        left = up_to(n_characters, (text for text in whole.documents if text not in used))
        return replace(whole, documents=tuple(left))

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """Chat messages as the model reads them."""
        if not self._why_no_chat:
            try:
                return self._chat.render(messages)
            except QuantkitError as error:
                self.not_rendered.append(error.message)
        return "\n\n".join(m["content"] for m in messages)

    def _written(self, wanted: Sequence[tuple[str, int]]) -> list[list[str]]:
        """Texts that the model writes, by their names and about how many tokens each has."""
        writer = sampling.Writer(
            self.model, self.tokenizer, self.seed, self.progress, self.kept, self.ranks
        )
        counts = [-(-n_tokens // (_NEW_TOKENS * 7 // 8)) for _, n_tokens in wanted]
        free = [
            (name, _starts(name), n)
            for (name, _), n in zip(wanted, counts, strict=True)
            if name != "dialogue"
        ]
        n_dialogues = sum(counts) - sum(n for _, _, n in free)
        writer.n_expected = sum(counts) * _NEW_TOKENS + n_dialogues * sampling.QUESTION_TOKENS
        texts = iter(writer.free_texts(free, _NEW_TOKENS) if free else ())
        return [
            writer.dialogues(self._chat, n, _NEW_TOKENS) if name == "dialogue" else next(texts)
            for (name, _), n in zip(wanted, counts, strict=True)
        ]


def _why(error: QuantkitError) -> str:
    return error.message.rstrip(".")


def _starts(name: str) -> list[str]:
    """The openings of a text that the model writes."""
    language = language_of(name)
    return sampling.openings() if language is None else list(sentences(language))


def _file(path: Path, n_tokens: int) -> tuple[Domain, list[str]]:
    """The text of a file, and clauses on what is not as it stands there."""
    text = files.read(path, n_tokens * _CHARACTERS_PER_TOKEN * 20)
    return Domain(path.name, path.name, text.documents), [f"{path.name}: {r}" for r in text.remarks]
