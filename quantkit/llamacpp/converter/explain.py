"""Explain why a conversion failed, in one sentence with a remedy.

The converter speaks through exceptions, log lines and exit codes. What is recognized here was
produced once and is tested; anything else is shown as the converter's own last words. The whole log
stays next to the output as `convert.log`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.llamacpp.converter.architectures import unsupported
from quantkit.llamacpp.converter.sandbox import Outcome
from quantkit.sandbox.outcome import plain

_MOST_WORDS = 4000


def tokenizer_hash(outcome: Outcome) -> str:
    """Return the converter's hash (`chkhsh`) of a tokenizer that it does not know."""
    found = re.search(r"chkhsh:\s+([0-9a-f]{64})", outcome.ended.log)
    return found[1] if found else "unknown"


def unknown_tokenizer(outcome: Outcome, log: Path) -> QuantkitError:
    """Return the error for a tokenizer that the converter does not know and llama.cpp cannot
    imitate.
    """
    return QuantkitError(
        f"The converter does not know this model's tokenizer (hash {tokenizer_hash(outcome)}), and "
        "none of llama.cpp's pre-tokenizers splits text as it does.",
        "Put the tokenizer.json and tokenizer_config.json of the model that it was fine-tuned from "
        "into a copy of it, or try a newer llama.cpp through QUANTKIT_CONVERTER. The full log is "
        f"{log}.",
    )


def explain(outcome: Outcome, log: Path, removed: Sequence[str] = ()) -> QuantkitError:
    """Return the error for a child that did not finish; `removed` names what was left out of its
    model.
    """
    error = _killed(outcome) or _recognized(outcome)
    if error is None:
        words = f"{outcome.error} {outcome.end.message}"
        words = plain(words if _says_why(outcome) else _last_line(outcome.ended.log))
        error = QuantkitError(f"The conversion failed: {words[:500]}.")
    if error.message == _NO_TOKENIZER and "auto_map removed from tokenizer_config.json" in removed:
        error = QuantkitError(
            "The tokenizer is program code that the model ships, which quantkit never runs.",
            "Choose a model whose tokenizer is a tokenizer.json or tokenizer.model.",
        )
    return QuantkitError(error.message, f"{error.remedy} The full log is {log}.".strip())


def _killed(outcome: Outcome) -> QuantkitError | None:
    """A limit or a signal."""
    limits, code, log = outcome.limits, outcome.ended.signal, outcome.ended.log
    if outcome.ended.why == "wall":
        return QuantkitError(
            f"The conversion was stopped after {limits.wall_seconds:,} seconds.",
            "The disk is slow or the model is broken; try a faster disk.",
        )
    spent = outcome.ended.cpu_seconds >= limits.cpu_seconds
    if code == signal.SIGXCPU or (code == signal.SIGKILL and spent):
        return QuantkitError(
            f"The conversion used up its {limits.cpu_seconds:,} seconds of processor time.",
            "No sound model of this size needs that much; check where it came from.",
        )
    if code == signal.SIGKILL:
        return QuantkitError(
            "The conversion was killed, most likely because the machine ran out of memory.",
            "Use a machine with more memory, or close other programs.",
        )
    if outcome.ended.why == "answer":
        return QuantkitError(
            "The converter printed more than can be read.", "Check where the model came from."
        )
    if (
        outcome.ended.why == "bytes"
        or code == signal.SIGXFSZ
        or re.search(r"Errno 27\b|File too large", log)
    ):
        return QuantkitError(
            f"The conversion tried to write a file above its limit of {limits.file_bytes:,} bytes.",
            "A GGUF of this model cannot be that large; check where the model came from.",
        )
    if (
        outcome.ended.why == "memory"
        or outcome.error == "MemoryError"
        or re.search(
            r"\bMemoryError|std::bad_alloc|Cannot allocate memory|failed to map segment"
            r"|can't allocate memory|memory allocation of \d+ bytes failed|Unable to allocate",
            log,
        )
    ):
        return QuantkitError(
            f"The conversion needed more than its {limits.memory_bytes:,} bytes of memory.",
            "No sound model of this size needs that much; check where it came from.",
        )
    if code > 0:
        return QuantkitError(
            f"The converter crashed ({signal.Signals(code).name}): {_last_line(log)}.",
            "The model's files may be broken; download them again.",
        )
    return None


def _recognized(outcome: Outcome) -> QuantkitError | None:
    """Something that the converter or transformers said."""
    said = outcome.ended.log[-2000:]
    if _says_why(outcome):  # not the log: it also holds errors that were survived
        said = f"{outcome.error}: {outcome.end.message}"[:_MOST_WORDS]
    for pattern, make in _KNOWN:
        found = re.search(pattern, said)
        if found:
            return make(found)
    return None


def _says_why(outcome: Outcome) -> bool:
    return bool(outcome.error and outcome.end.message)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" *|")]
    return lines[-1].rstrip(".")[:500] if lines else "it left no message"


_Make = Callable[[re.Match[str]], QuantkitError]


def _say(message: str, remedy: str = "") -> _Make:
    """A sentence with the pattern's groups filled in as {0}, {1}."""

    def make(found: re.Match[str]) -> QuantkitError:
        return QuantkitError(message.format(*found.groups()), remedy.format(*found.groups()))

    return make


_NO_TOKENIZER = "The model has no tokenizer that the converter can read."

# Pattern and sentence; the first that is found counts.
_KNOWN: tuple[tuple[str, _Make], ...] = (
    (
        r"No space left on device|Disk quota exceeded|\[Errno (?:28|122)\]",
        _say("The disk is full.", "Free some space, or choose another --out."),
    ),
    (r"Model (\S+) is not supported", lambda found: unsupported(found[1])),
    (
        r"assert max\(tokenizer\.vocab\.values\(\)\) < vocab_size",
        _say(
            "The tokenizer has more tokens than the vocab_size in config.json.",
            "Its added tokens have no embeddings: use the tokenizer files of the base model.",
        ),
    ),
    (
        r"the tokenizer has no vocabulary|Can't load tokenizer for"
        r"|Tokenizer class \S+ does not exist|Couldn't instantiate the backend tokenizer"
        r"|File not found: \S*tokenizer\.model|Cannot find Llama BPE tokenizer|tokenizer\.jsonl'",
        _say(
            _NO_TOKENIZER,
            "Add the tokenizer.json or tokenizer.model of its base model to a local copy.",
        ),
    ),
    (
        r"could not parse ModelProto",
        _say("tokenizer.model is broken or truncated.", "Download the file again."),
    ),
    (
        r"requires? --target-model-dir|--target-model-dir to be specified",
        _say(
            "This is a draft model for speculative decoding, which only works with another model.",
            "Choose the model it drafts for.",
        ),
    ),
    (
        r"Missing or incomplete model files|Missing tensors: (\[.{0,200})",
        _say("The checkpoint lacks tensors that it lists.", "Download the model again."),
    ),
    (
        r"Block (\d+) of (\d+) has no tensors",
        _say(
            "The checkpoint is incomplete: block {0} of its {1} has no weights.",
            "Download the model again, or check num_hidden_layers in its config.json.",
        ),
    ),
    (
        r"(\S+) has a number that is not finite in (\w+)",
        _say(
            "The weights of {0} hold NaN or infinite values (written as {1}).",
            "Choose another revision of the model; it is damaged, or its range needs bf16.",
        ),
    ),
    (
        r"Can not map tensor '([^']+)'",
        _say(
            "The checkpoint has a tensor that its architecture does not know: {0}.",
            "It may be an adapter, a quantized export or a changed architecture; "
            "choose the original model.",
        ),
    ),
    (
        r"Quant method is not yet supported: '?([\w-]+)|Quant format '([^']+)' for method",
        _say(
            "The checkpoint is already quantized in a way that the converter cannot undo.",
            "Choose the original, unquantized model.",
        ),
    ),
    (
        r"could not find any of: (\[[^\]]*\])|KeyError: '(\w+)'",
        _say(
            "The model's config.json lacks a setting that its architecture needs.",
            "Take config.json from the original model.",
        ),
    ),
    (
        r"Failed to detect model architecture",
        _say("The model's config.json names no architecture.", "Give a language model."),
    ),
    (
        r"mistral-common",
        _say(
            "The tokenizer is in Mistral's own format (tekken.json), which needs mistral-common.",
            "Choose a repository that also has tokenizer.json.",
        ),
    ),
    (
        r"is denied in the sandbox",
        _say(
            "The converter needed the network or another program, which it is not allowed.",
            "Something is missing from the model's folder; download it again.",
        ),
    ),
)
