"""Ids with their texts and kinds, tokens of texts, ends of turns: a GGUF's are the tokenizer's."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from tiny_models import tiny_llama
from transformers import AutoTokenizer

from evaluators import vocabulary
from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp import templates
from quantkit.llamacpp.chat import ChatTemplate
from quantkit.llamacpp.converter.convert import ConversionResult, convert
from quantkit.llamacpp.converter.pretokenizer import PROBES
from quantkit.model.blockwise import load_tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def chat_model(folder: Path, *, sentencepiece: bool) -> Path:
    """A SentencePiece model whose fine-tune added two chat tokens; as transformers 5 saves it,
    beside its base's tokenizer.model or without it.
    """
    tiny_llama(folder, vocab_size=514)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    model = (folder / "tokenizer.model").read_bytes()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    if sentencepiece:
        (folder / "tokenizer.model").write_bytes(model)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def skeleton(folder: Path) -> ConversionResult:
    return convert(folder, folder.with_name(f"{folder.name}.gguf"), skeleton=True)


def keys(folder: Path) -> dict[str, Any]:
    return GgufFile(folder.with_name(f"{folder.name}.gguf")).metadata


@contextmanager
def llama_vocabulary(folder: Path) -> Iterator[Any]:
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    path = folder.with_name(f"{folder.name}.gguf")
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model
    yield llama_cpp.llama_model_get_vocab(model)
    llama_cpp.llama_model_free(model)


def llama_tokens(vocab: Any, text: str) -> list[int]:
    data = text.encode()
    ids = (ctypes.c_int32 * 64)()
    return list(ids[: llama_cpp.llama_tokenize(vocab, data, len(data), ids, 64, False, True)])


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConversionResult]:
    folder = chat_model(tmp_path_factory.mktemp("m") / "Added", sentencepiece=True)
    edit(folder / "generation_config.json", eos_token_id=[2, 513])
    return folder, skeleton(folder)


def test_added_tokens_have_their_names(named: tuple[Path, ConversionResult]) -> None:
    """They stood in tokenizer.json alone, and came out as [PAD512], unused."""
    folder, result = named
    about = keys(folder)
    assert about["tokenizer.ggml.tokens"][510:] == ["V", "@", "<|im_start|>", "<|im_end|>"]
    assert about["tokenizer.ggml.token_type"][510:] == [NORMAL, NORMAL, CONTROL, CONTROL]
    with llama_vocabulary(folder) as vocab:
        assert llama_tokens(vocab, "<|im_start|><|im_end|>") == [512, 513]
    assert result.tokens.check.passed
    assert "514 ids and the tokens of 14 texts" in result.tokens.check.about
    assert result.tokens.text == "the rendered chat template" and 512 in result.tokens.ids


def test_what_llama_cpp_does_by_design_is_said(named: tuple[Path, ConversionResult]) -> None:
    _, result = named
    assert set(result.tokens.apart) == {vocabulary.SPACE, vocabulary.FIRST_SPACE}
    assert vocabulary.SPACE in result.tokens.check.about
    assert [f"{vocabulary.SPACE}."] == [x for x in result.tokens.notes if "follows" in x]


def test_a_list_of_merges_has_the_order(tmp_path: Path) -> None:
    """Without tokenizer.model every token got one score, and texts other tokens."""
    folder = chat_model(tmp_path / "Merges", sentencepiece=False)
    result = skeleton(folder)
    assert result.tokens.check.passed
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "We would have told the others"
    with llama_vocabulary(folder) as vocab:
        assert llama_tokens(vocab, text) == tokenizer.encode(text, add_special_tokens=False)
    assert len(set(keys(folder)["tokenizer.ggml.scores"])) > 100


def test_ends_that_llama_cpp_knows_need_no_key(named: tuple[Path, ConversionResult]) -> None:
    """It knows <|im_end|> by its name."""
    folder, _ = named
    assert keys(folder)["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.eot_token_id" not in keys(folder)
    with llama_vocabulary(folder) as vocab:
        assert [i for i in range(514) if llama_cpp.llama_vocab_is_eog(vocab, i)] == [2, 513]


def test_other_ends_get_keys(tmp_path: Path) -> None:
    """As many as there are; the rest is told. Where only a list names the ends, there was not even
    an eos key. (No template, either: plain text is compared then.)
    """
    folder = tiny_llama(tmp_path / "Ends")
    edit(folder / "generation_config.json", eos_token_id=[300, 301, 302, 303])
    edit(folder / "config.json", eos_token_id=[300, 301])
    edit(folder / "tokenizer_config.json", eos_token=None)
    result = skeleton(folder)
    about = keys(folder)
    ids = [about[f"tokenizer.ggml.{x}_token_id"] for x in ("eos", "eot", "eom")]
    assert ids == [300, 301, 302]
    with llama_vocabulary(folder) as vocab:
        assert all(llama_cpp.llama_vocab_is_eog(vocab, i) for i in ids)
    (warning,) = result.warnings
    assert "no key left" in warning and about["tokenizer.ggml.tokens"][303] in warning
    assert result.tokens.check.passed and result.tokens.text == "plain text"
    assert "13 texts" in result.tokens.check.about and len(PROBES) == 13


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its base's tokenizer.model lies beside a tokenizer.json with two words exchanged."""
    folder = chat_model(tmp_path / "Stale", sentencepiece=True)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    vocab = content["model"]["vocab"]
    vocab["▁the"], vocab["▁of"] = vocab["▁of"], vocab["▁the"]
    path.write_text(json.dumps(content), "utf-8")
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(QuantkitError, match="not the tokenizer's: token .* instead of '▁"):
        skeleton(folder)
    assert not folder.with_name("Stale.gguf").exists()


def test_a_normalizer_is_said(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "Nfc", tokenizer="bpe")
    path = folder / "tokenizer.json"
    edit(path, normalizer={"type": "NFC"})
    result = skeleton(folder)
    assert result.tokens.check.passed
    assert vocabulary.NORMALIZED.format("NFC") in result.tokens.apart


# ---- templates


class Stub:
    """A tokenizer, for what becomes of its template's text."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template([messages], chat_template=self.chat_template)
        return str(texts[0])


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "done"),
        ("{{ 'x' * 3000000 }}", "more than 1,000,000 characters"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "cannot be rendered"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_sentence(
    template: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    begun = time.monotonic()
    found = templates.rendered(Stub(template), templates.CONVERSATION)
    assert sentence in found["error"] and found["error"].endswith(".")
    assert time.monotonic() - begun < 10


def test_rendering_in_a_process_of_its_own(named: tuple[Path, ConversionResult]) -> None:
    folder, _ = named
    text = ChatTemplate(load_tokenizer(folder)).render(templates.CONVERSATION, True)
    assert text.startswith("<|im_start|>user\nName three things")
    assert text.endswith("<|im_start|>assistant\n")
