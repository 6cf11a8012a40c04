"""Turn text into tokens: what calibrate writes before it runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from quantkit import hub
from quantkit.calibration.documents import (
    EVAL_TOKENS,
    Domain,
    interleave,
    n_interleaved,
    pack,
    split,
    unpack,
)
from quantkit.calibration.mix import Mix, Reader
from quantkit.calibration.sources import Described
from quantkit.config import N_CTX
from quantkit.errors import QuantkitError
from quantkit.files import PARTIAL, replacing, write_json
from quantkit.model.blockwise import BlockwiseModel
from quantkit.run.events import EventLog
from quantkit.run.folder import read_json
from quantkit.run.stage import Run
from quantkit.sandbox import untrusted

STAGE = "calibrate"
_MIX = "mix.json"
_GRADIENTS = 2400  # tokens that the model writes in the time that the Fisher information takes
_WRITTEN = f"written.json{PARTIAL}"  # until the stage is recorded


@dataclass(frozen=True)
class Texts:
    """What the text is, and the names of what is held out of it to validate on."""

    note: str
    domains: tuple[Described, ...]
    languages: dict[str, float]
    eval: tuple[str, ...]


class Bar:
    """One progress bar over what the stage does: the model writes text, then gradients are
    taken, which is as much work as writing `_GRADIENTS` tokens.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._n_written = 0

    def written(self, done: int, total: int, message: str) -> None:
        """Tell how many tokens of the text that the model writes are there."""
        self._n_written = total
        self._events.progress(STAGE, done, total + _GRADIENTS, message)

    def gradients(self, done: int, total: int) -> None:
        """Tell how far the gradients are."""
        part = _GRADIENTS * done // max(total, 1)
        whole = self._n_written + _GRADIENTS
        message = "gradients at the outputs of every layer"
        self._events.progress(STAGE, self._n_written + part, whole, message)


def write_texts(run: Run, model: BlockwiseModel, tokenizer: Any, bar: Bar) -> Texts:
    """Write the tokens and the texts to validate on; return what the report says of them. Once: a
    killed stage goes on with the text that it began with, for neither the Hub nor a model gives the
    same text again everywhere.
    """
    path = run.artifacts.calibration.with_name(_MIX)
    if path.exists() and run.artifacts.tokens.exists() and run.artifacts.calibrated.exists():
        known = untrusted.build(Texts, read_json(path))
        if all((run.artifacts.eval_texts / name).exists() for name in known.eval):
            run.events.emit(
                STAGE, "note", f"continuing with the text that was read before: {known.note}"
            )
            return known
    mix = _read_mix(run, model, tokenizer, bar)
    tokens, seen = _tokens(run, mix.domains, tokenizer)
    with replacing(run.artifacts.tokens) as partial:
        save_file(tokens, partial)
    with replacing(run.artifacts.calibrated) as partial:
        partial.write_text(seen, "utf-8", newline="")
    texts = _eval_texts(run, mix.domains, tokenizer)
    for name, text in texts.values():
        with replacing(run.artifacts.eval_texts / f"{name}.txt") as partial:
            partial.write_text(text, "utf-8", newline="")
    about = Texts(
        mix.note,
        tuple(
            Described.of(domain, weight, texts[i][0] if i in texts else None)
            for i, (domain, weight) in enumerate(mix.domains)
        ),
        {code: round(bits, 3) for code, bits in mix.languages.items()},
        tuple(f"{name}.txt" for name, _ in texts.values()),
    )
    write_json(path, about)
    return about


def _read_mix(run: Run, model: BlockwiseModel, tokenizer: Any, bar: Bar) -> Mix:
    """The calibration mix as documents."""
    profile = run.profile
    token, seed = hub.resolve_token(), run.config.seed
    kept = run.artifacts.calibration.with_name(_WRITTEN)
    reader = Reader(
        model.model, tokenizer, token, seed, bar.written, model.is_streamed, kept, ranks=run.ranks
    )
    n_tokens = profile.calibration_tokens + profile.heldout_tokens
    mix = reader.mix(run.config.calibration, n_tokens, profile.eval_windows * N_CTX)
    run.events.emit(STAGE, "note", mix.note)
    return mix


def _tokens(
    run: Run, domains: Sequence[tuple[Domain, float]], tokenizer: Any
) -> tuple[dict[str, np.ndarray], str]:
    """Sequences of the train and heldout parts, domains interleaved by weight: int64 (n, N_CTX)
    each. And their text, domain by domain: no more is seen by any stage before validation.
    """
    wanted = {"train": run.profile.calibration_tokens, "heldout": run.profile.heldout_tokens}
    parts = [split(domain, run.config.seed) for domain, _ in domains]
    weights = [weight for _, weight in domains]
    tokens = {}
    seen: list[str] = []
    for part, n_tokens in wanted.items():
        n = n_tokens // N_CTX
        packed = [pack(p[part], tokenizer, n, N_CTX) for p in parts]
        tokens[part] = interleave(packed, weights, n)
        taken = n_interleaved(packed, weights, n)
        seen += [unpack(rows[:k], tokenizer) for rows, k in zip(packed, taken, strict=True) if k]
        if len(tokens[part]) < n:
            run.events.emit(
                STAGE,
                "note",
                f"only {tokens[part].size} of {n_tokens} {part} tokens: the text is short",
            )
        if not len(tokens[part]):
            raise QuantkitError(
                f"The calibration text has fewer than {N_CTX} {part} tokens.", "Give more text."
            )
    return tokens, "\n\n".join(seen)


def _eval_texts(
    run: Run, domains: Sequence[tuple[Domain, float]], tokenizer: Any
) -> dict[int, tuple[str, str]]:
    """What is held out of each domain for validation, by the domain's number: a name for its file,
    and the text. Domains with less than a window of it are left out: better now than after the long
    work.
    """
    found: dict[int, tuple[str, str]] = {}
    for i, (domain, _) in enumerate(domains):
        text = "\n\n".join(split(domain, run.config.seed)["eval"])
        if len(tokenizer(text, verbose=False).input_ids) < EVAL_TOKENS:
            run.events.emit(
                STAGE, "note", f"{domain.name} has too little text to hold any out for validation"
            )
            continue
        name = Path(domain.name).stem
        while name in {other for other, _ in found.values()}:  # notes.txt and notes.jsonl
            name += "-"
        found[i] = name, text
    if not found and run.config.eval_text is None:
        raise QuantkitError(
            f"No calibration text is long enough to hold out {EVAL_TOKENS} tokens for validation.",
            "Give more text, or a text to validate on with --eval-text.",
        )
    return found
