"""Add what the converter leaves out of a vocabulary, before the header is written. Runs inside the
sandbox, beside the converter's own classes.

**Names of added tokens.** Beside a SentencePiece model the converter reads `added_tokens.json` and
`tokenizer_config.json`; transformers 5 writes added tokens to `tokenizer.json` alone. Such ids came
out as `[PAD512]`, unused, and their texts as many tokens each. Here every id without a name gets
the one that the tokenizer has for it.

**Order of merges.** A SentencePiece BPE that is there as `tokenizer.json` alone is written with one
score for all of its tokens; llama.cpp merges by scores, so texts got other tokens. The list of
merges has the order.

**The space before a text.** Whether the tokenizer puts one is seen by asking it.

**Ends.** `eos_token_id` may be a list, of which the GGUF has room for one, and an `eot` and `eom`
beside it. Which further ones llama.cpp finds by their texts, only it knows: it is asked, with a
file of nothing but the keys. Keys are added only for ends that it would miss.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.sandbox.untrusted import Settings

if TYPE_CHECKING:
    from gguf.gguf_writer import GGUFValue

_TOKENS, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_SCORES, _MODEL = "tokenizer.ggml.scores", "tokenizer.ggml.model"
_PREFIX = "tokenizer.ggml.add_space_prefix"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_SPACE = "\u2581"  # how SentencePiece writes a space
_ADDED_SCORE = -1000.0  # the converter's own for added tokens
_EOS, _EOT, _EOM = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def complete(writer: Any, folder: Path, target: Path, looks_special: Any) -> list[str]:
    """Complete the keys of a GGUF writer whose header is not written yet.

    Args:
        writer: the converter's `gguf.GGUFWriter`.
        folder: the model's, with its tokenizer.
        target: where the file will be; until then something else may be.
        looks_special: the converter's own view of a text that should be a control token.

    Returns:
        The texts of tokens that end a turn and that llama.cpp will not take for an end.
    """
    keys = writer.kv_data[0]
    if _TOKENS not in keys or _KINDS not in keys:
        return []  # an encoder's file
    if keys[_MODEL].value == "llama" and _SCORES in keys:
        rank_merges(keys, folder)
        tokenizer = _tokenizer(str(folder))
        if tokenizer is not None:
            name_added(keys, tokenizer, looks_special)
            say_prefix(writer, tokenizer)
    return mark_ends(writer, ends_of(folder), target)


@functools.lru_cache(maxsize=1)
def original_tokenizer(folder: str) -> Any:
    """Return the tokenizer by transformers, which takes seconds to load 262,144 tokens: once for
    all that this process asks it.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tokenizer(folder: str) -> Any:
    """None where transformers cannot load what the converter can, which the comparison of tokens
    tells.
    """
    try:
        return original_tokenizer(folder)
    except Exception as error:
        logging.getLogger(__name__).warning("transformers cannot load the tokenizer: %s", error)
        return None


def name_added(keys: Mapping[str, GGUFValue], tokenizer: Any, looks_special: Any) -> None:
    """Give ids that the converter left without a name the added tokens of the tokenizer."""
    tokens, kinds = keys[_TOKENS].value, keys[_KINDS].value
    for i, token in tokenizer.added_tokens_decoder.items():
        if i >= len(tokens) or kinds[i] != _UNUSED or not _is_filler(tokens[i], i):
            continue
        is_control = token.special or looks_special(token.content)
        # llama.cpp looks for the texts of user-defined tokens in text as it was written
        text = token.content if is_control else token.content.replace(_SPACE, " ")
        tokens[i], kinds[i] = text.encode(), _CONTROL if is_control else _USER_DEFINED
        keys[_SCORES].value[i] = _ADDED_SCORE


def say_prefix(writer: Any, tokenizer: Any) -> None:
    """Write whether texts begin with a space piece, where llama.cpp would assume otherwise."""
    pieces = tokenizer.tokenize("a")
    begins = bool(pieces) and pieces[0].startswith(_SPACE)
    key = writer.kv_data[0].get(_PREFIX)
    if begins != (True if key is None else bool(key.value)):
        writer.kv_data[0].pop(_PREFIX, None)
        writer.add_add_space_prefix(begins)


def _is_filler(token: str | bytes, i: int) -> bool:
    return token in (f"[PAD{i}]", f"[PAD{i}]".encode())


def rank_merges(keys: Mapping[str, GGUFValue], folder: Path) -> None:
    """Give the tokens of a SentencePiece BPE without scores their places in the list of merges."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    kinds, scores = keys[_KINDS].value, keys[_SCORES].value
    if len({score for score, kind in zip(scores, kinds, strict=True) if kind == _NORMAL}) != 1:
        return
    model = json.loads(path.read_text(encoding="utf-8")).get("model") or {}
    pairs = model.get("merges") or []
    merged = ("".join(m) if isinstance(m, list) else m.replace(" ", "", 1) for m in pairs)
    ranks: dict[bytes, int] = {}
    for rank, text in enumerate(merged):
        ranks.setdefault(text.encode(), rank)
    for i, token in enumerate(keys[_TOKENS].value):
        place = ranks.get(token if isinstance(token, bytes) else token.encode())
        if kinds[i] == _NORMAL and place is not None:
            scores[i] = -float(place)


def ends_of(folder: Path) -> list[int]:
    """Return the ids after which generation stops, as `generate` of transformers reads them; the
    first is the end of a text.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        for part in Settings.parse(path.read_bytes(), name).parts:
            said = part.get("eos_token_id")
            said = said if isinstance(said, list) else [said]
            ids = [i for i in said if type(i) is int and i >= 0]
            if ids:
                return list(dict.fromkeys(ids))
    return []


def mark_ends(writer: Any, ends: Iterable[int], target: Path) -> list[str]:
    """Add keys for ends that llama.cpp would miss. Returns the texts of those for which there is no
    key left.
    """
    keys = writer.kv_data[0]
    tokens = keys[_TOKENS].value
    known = {keys[name].value for name in (_EOS, _EOT, _EOM) if name in keys}
    ends = [i for i in ends if i < len(tokens)]
    if ends and _EOS not in keys:
        writer.add_eos_token_id(ends[0])
        known.add(ends[0])
    if not set(ends) - known:
        return []
    found, has_eot = _ends_found(writer, ends, target)
    missed = [i for i in ends if i not in found]
    # The eot that llama.cpp finds by its text stays an end when another is named in the key.
    free = [_EOM, _EOT] if has_eot else [_EOT, _EOM]
    for key in (key for key in free if key not in keys):
        if missed:
            writer.add_uint32(key, missed.pop(0))
    return [_text(tokens[i]) for i in missed]


def _text(token: str | bytes) -> str:
    return token if isinstance(token, str) else token.decode("utf-8", "replace")


def _ends_found(writer: Any, ends: Iterable[int], target: Path) -> tuple[set[int], bool]:
    """Those of `ends` that llama.cpp takes for an end, and whether it knows an end of turn; by a
    file that has the keys alone.
    """
    import gguf
    import llama_cpp

    probe = gguf.GGUFWriter(target, writer.arch)
    probe.kv_data[0].update(writer.kv_data[0])
    probe.write_header_to_file()
    probe.write_kv_data_to_file()
    probe.close()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(target).encode(), parameters)
    if not model:
        raise ValueError("llama.cpp cannot read the vocabulary")
    vocab = llama_cpp.llama_model_get_vocab(model)
    found = {i for i in ends if llama_cpp.llama_vocab_is_eog(vocab, ctypes.c_int32(i))}
    has_eot = llama_cpp.llama_vocab_eot(vocab) >= 0
    llama_cpp.llama_model_free(model)
    return found, has_eot
