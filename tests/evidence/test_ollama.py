"""Sampling settings for Ollama from a model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_llama

from quantkit.evidence.ollama import params, sampling
from quantkit.sandbox.untrusted import Settings

TOKENS = ("<s>", "</s>", "a", "<|im_end|>")
QWEN = {
    "do_sample": True,
    "eos_token_id": [3, 1],
    "pad_token_id": 1,
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.37.0",
}


def test_names_are_ollamas() -> None:
    assert sampling(Settings(QWEN), TOKENS) == {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "stop": ["<|im_end|>", "</s>"],
    }


@pytest.mark.parametrize(
    "said", [{}, {"eos_token_id": 1}, {**QWEN, "do_sample": False}, {"max_length": 20}]
)
def test_nothing_is_made_up(said: dict[str, Any]) -> None:
    """Without settings, or where the author draws nothing, Ollama's own stay."""
    assert sampling(Settings(said), TOKENS) == {}


@pytest.mark.parametrize("value", ["0.7", -1, 1e300, True, None, [0.7]])
def test_strange_values_are_left_out(value: Any) -> None:
    assert sampling(Settings({"temperature": value, "top_p": 0.9}), ()) == {"top_p": 0.9}
    odd = {"top_p": 0.9, "eos_token_id": [value, 99, -1]}
    assert sampling(Settings(odd), TOKENS) == {"top_p": 0.9}


def test_of_a_folder(tmp_path: Path) -> None:
    output = write_llama(tmp_path / "a.gguf")
    assert params(tmp_path, output) == {}
    path = tmp_path / "generation_config.json"
    for data in ("", "[1]", "{" * 100, '{"temperature": NaN}'):
        path.write_text(data)
        assert params(tmp_path, output) == {}
    path.write_text('{"temperature": 0.6}')
    assert params(tmp_path, output) == {"temperature": 0.6}
