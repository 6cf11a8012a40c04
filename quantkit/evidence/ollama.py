"""The file `params` by which Ollama samples as the model's author meant it.

`ollama run hf.co/OWNER/NAME` reads it beside a GGUF: JSON with Ollama's own names. No file
`template` is written: the Hub makes Ollama's Go template from the Jinja template in the GGUF, and
one that we wrote in its place could only be another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.gguf_file.read import GgufFile
from quantkit.sandbox import untrusted
from quantkit.sandbox.untrusted import Settings

NAME = "params"
_MOST_BYTES = 1_000_000
_MOST_STOPS = 16
# transformers' name, Ollama's, and what it may be.
_SETTINGS = (
    ("temperature", "temperature", 0.0, 5.0),
    ("top_p", "top_p", 0.0, 1.0),
    ("top_k", "top_k", 0.0, 1e6),
    ("min_p", "min_p", 0.0, 1.0),
    ("repetition_penalty", "repeat_penalty", 0.1, 5.0),
)


def params(folder: Path, output: Path) -> dict[str, Any]:
    """Return what `generation_config.json` in the model's folder says of sampling, by Ollama's
    names, and the tokens of the GGUF `output` that end an answer; empty where it says nothing, or
    that nothing is drawn.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        said = Settings(untrusted.read_json(path, _MOST_BYTES))
    except (OSError, ValueError, TypeError):  # transformers does without it, too
        return {}
    return sampling(said, GgufFile(output).metadata.get("tokenizer.ggml.tokens") or ())


def sampling(said: Settings, tokens: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a generation_config, and `stop`: those of `tokens` that it ends at."""
    if said.get("do_sample") is False:
        return {}
    found: dict[str, Any] = {}
    for name, own, least, most in _SETTINGS:
        value: Any = said.get(name)
        if type(value) in (int, float) and least <= value <= most:  # neither True nor NaN
            found[own] = value
    if "repeat_penalty" in found:
        found["repeat_last_n"] = -1  # of the whole context, as in transformers
    ends = said.get("eos_token_id")
    ids: list[Any] = ends if isinstance(ends, list) else [ends]
    known = [tokens[i] for i in ids[:_MOST_STOPS] if type(i) is int and 0 <= i < len(tokens)]
    if found and known:
        found["stop"] = list(dict.fromkeys(known))
    return found
