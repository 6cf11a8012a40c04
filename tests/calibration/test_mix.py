"""A spec becomes text: languages that a model knows and does not know, texts that it writes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from transformers import GenerationConfig

from quantkit import hub
from quantkit.calibration import knowledge, mix, sampling, sources
from quantkit.calibration.documents import Domain
from quantkit.calibration.mix import Reader
from quantkit.config import N_CTX, PROFILES
from quantkit.config.calibration import Request
from quantkit.config.languages import LANGUAGES, sentences
from quantkit.errors import QuantkitError
from quantkit.llamacpp.chat import ChatTemplate
from quantkit.model.blockwise import load_model, load_tokenizer


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return Reader(model, tokenizer, None, 0, lambda done, total, message: None)


STARTS = ["the", "a much longer opening"]


def writer(reader: Reader) -> sampling.Writer:
    return sampling.Writer(
        reader.model, reader.tokenizer, reader.seed, reader.progress, reader.kept
    )


def written(reader: Reader, n: int = 3) -> list[str]:
    (texts,) = writer(reader).free_texts([("prose", STARTS, n)], 12)
    return texts


def read(reader: Reader, name: str, n_tokens: int) -> Domain:
    (found,), _ = reader.read([(Request(name, 1), n_tokens)])
    return found


def test_what_is_written_is_the_models_own(reader: Reader) -> None:
    """Whatever the checkpoint says of how it likes to be sampled in chats."""
    plain = written(reader)
    assert all(text.startswith(("the", "a much longer opening")) for text in plain)
    before = reader.model.generation_config
    said = {"repetition_penalty": 1.5, "top_p": 0.1, "temperature": 0.2, "num_return_sequences": 2}
    said |= {"stop_strings": ["e"], "return_dict_in_generate": True, "use_cache": False}
    reader.model.generation_config = GenerationConfig(**said, do_sample=True)
    try:
        assert written(reader) == plain
        assert reader.model.generation_config.top_p == 0.1
    finally:
        reader.model.generation_config = before


def test_a_text_is_its_own_whatever_is_written_beside_it(reader: Reader) -> None:
    model, tokenizer = copy.deepcopy(reader.model).float(), reader.tokenizer
    prompts = [sampling.Prompt(text, (0, i)) for i, text in enumerate(3 * STARTS)]
    together = sampling.continue_batch(model, tokenizer, prompts, 12)
    alone = [sampling.continue_batch(model, tokenizer, [p], 12) for p in prompts]
    assert together == [text for (text,) in alone] and len(set(together)) == len(prompts)
    other = sampling.Prompt(prompts[0].text, (1, 0))
    assert sampling.continue_batch(model, tokenizer, [other], 12) != alone[0]


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    prompts = [sampling.Prompt("", (i,)) for i in range(10_000)]
    draw = sampling._Draw(prompts, 7, 2, torch.device("cpu"), lambda n_done: None)
    scores = shares.log().expand(len(prompts), 4)
    found = [draw(torch.zeros(1, 7 + step), scores).argmax(1) for step in range(2)]
    for tokens in found:
        counts = tokens.bincount(minlength=4) / len(prompts)
        assert torch.allclose(counts, shares, atol=0.015)  # three standard deviations
    assert not torch.equal(*found)


def test_a_killed_run_goes_on_after_the_batches_that_are_written(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sampling._MOST_TEXTS, "cpu", 2)
    whole, kept = written(reader, 5), tmp_path / "written.json"

    class Killed(BaseException): ...

    def die(done: int, total: int, message: str) -> None:
        if done > 3 * 12:
            raise Killed

    with pytest.raises(Killed):
        written(replace(reader, progress=die, kept=kept), 5)
    steps: list[int] = []
    resumed = replace(reader, progress=lambda done, *_: steps.append(done), kept=kept)
    assert written(resumed, 5) == whole
    assert min(steps) == 2 * 12, "the first batch is not written again"
    assert written(replace(reader, seed=1, kept=kept), 5) != whole, "kept by what was asked for"


def test_a_tokenizer_without_padding_or_with_one_beyond_the_table(reader: Reader) -> None:
    for pad, end in (("<far away>", "</s>"), (None, None)):
        tokenizer = copy.deepcopy(reader.tokenizer)
        if pad is not None:
            tokenizer.add_special_tokens({"pad_token": pad})
            assert tokenizer.pad_token_id >= 512
        tokenizer.eos_token = end
        assert len(written(replace(reader, tokenizer=tokenizer))) == 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system turn, please') }}",
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
        "always the same",
    ],
)
def test_a_template_that_takes_no_plain_turns(reader: Reader, template: str) -> None:
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer.chat_template = template
    assert sampling.why_no_chat(ChatTemplate(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert not sampling.why_no_chat(ChatTemplate(tokenizer))


def test_a_streamed_model_writes_no_text(reader: Reader) -> None:
    """Every token would read all of its weights; unless nothing else was asked for."""
    streamed = replace(reader, is_streamed=True)
    found = streamed.mix("docs,code,prose", 600, 64)
    assert [domain.name for domain, _ in found.domains] == ["docs", "code"]
    assert "no text written by the model" in found.note
    assert sum(weight for _, weight in found.domains) == pytest.approx(1)
    asked = streamed.mix("prose", 600, 64)
    assert [domain.name for domain, _ in asked.domains] == ["prose"]


def test_batches_are_smaller_where_keys_and_values_are_large(reader: Reader) -> None:
    def of(**config: int) -> int:
        shapes = {"num_attention_heads": 32, "hidden_size": 4096, **config}
        model = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
        model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**shapes))
        return sampling.texts_at_once(model, 200)  # type: ignore[arg-type]

    gemma = {"num_hidden_layers": 18, "num_key_value_heads": 1, "head_dim": 256}
    assert of(**gemma, vocab_size=1000) == 1024 and 400 < of(**gemma, vocab_size=262_144) < 800
    llama = {"num_hidden_layers": 32, "vocab_size": 128_256}
    assert of(**llama, num_key_value_heads=8) > 100 and of(**llama) < 50
    assert of(num_hidden_layers=10_000, vocab_size=32_000) == 4


def test_the_sentences_are_the_same_in_all_languages() -> None:
    """As many in each, none twice, and of about as much text."""
    english = sentences("en")
    for code in LANGUAGES:
        found = sentences(code)
        assert len(found) == len(english) >= 8 and len(set(found)) == len(found)
        assert 0.25 < sum(map(len, found)) / sum(map(len, english)) < 1.5, code
        assert "1923" in found[0]
    assert not sentences("xx")


def test_at_least_eight_scripts_of_letters() -> None:
    import unicodedata

    def script(code: str) -> str:
        """The script of most letters: the first word of their Unicode names."""
        names = [unicodedata.name(c).split()[0] for c in "".join(sentences(code)) if c.isalpha()]
        return max(set(names), key=names.count)

    assert len({script(code) for code in LANGUAGES}) >= 8


def test_bits_are_those_of_the_model(reader: Reader) -> None:
    """A model that expects every token alike needs log2 of their number for each."""
    ids = reader.tokenizer("\nhello").input_ids

    def level(input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 512))

    class Level:
        device = torch.device("cpu")
        __call__ = staticmethod(level)

    found = knowledge.bits_of(Level(), reader.tokenizer, ("hello",))  # type: ignore[arg-type]
    assert found == pytest.approx((len(ids) - 1) * math.log2(512))


def test_a_mix_leaves_out_languages_that_the_model_does_not_know(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = knowledge.MOST_BITS
    bits = {"en": most / 2} | dict.fromkeys(LANGUAGES, 2 * most) | {"de": 0.9 * most, "zh": most}
    monkeypatch.setattr(knowledge, "bits_by_language", lambda model, tokenizer: bits)
    monkeypatch.setattr(Reader, "_written", _documents)
    monkeypatch.setattr(Reader, "_of_others", _others)
    made = reader.mix("docs:3,prose-languages:1", 1000, 100)
    assert [d.name for d, _ in made.domains] == ["docs", "prose-de", "prose-zh"]
    assert sum(share for _, share in made.domains) == pytest.approx(1)
    assert made.domains[1][1] == made.domains[2][1] < made.domains[0][1] / 10
    assert made.languages == {code: bits[code] / bits["en"] for code in LANGUAGES}
    assert "left out Arabic, Spanish" in made.note and "German" not in made.note
    named = reader.mix("prose-hi", 1000, 100)
    assert [d.name for d, _ in named.domains] == ["prose-hi"], "asked for by name"
    assert named.languages == {"hi": 4.0} and "no " not in named.note
    assert reader.mix("english", 1000, 100).languages == {}
    with pytest.raises(QuantkitError, match="No calibration text"):
        _needs(monkeypatch, 9 * most)
        reader.mix("languages", 1000, 100)


def _needs(monkeypatch: pytest.MonkeyPatch, bits: float) -> None:
    """A model that needs so many bits in every language."""
    found = dict.fromkeys(("en", *LANGUAGES), bits)
    monkeypatch.setattr(knowledge, "bits_by_language", lambda model, tokenizer: found)


def _documents(self: Reader, wanted: Sequence[tuple[str, int]]) -> list[list[str]]:
    return [[f"{name} {i} " + "word " * 20 for i in range(5)] for name, _ in wanted]


def _others(self: Reader, name: str, n_characters: int) -> Domain:
    return Domain(name, "here", tuple(f"{name} {i}" for i in range(5)))


@pytest.mark.parametrize(
    ("reason", "first"), [(None, "fineweb-edu"), ("there is no network", "docs")]
)
def test_auto_is_a_mix(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, reason: str | None, first: str
) -> None:
    monkeypatch.setattr(hub, "why_offline", lambda token: reason)
    monkeypatch.setattr(Reader, "_written", _documents)
    monkeypatch.setattr(Reader, "_of_others", _others)
    _needs(monkeypatch, knowledge.MOST_BITS)
    made = reader.mix("auto", 1000, 100)
    assert made.domains[0][0].name == first
    assert len(made.domains) >= 4 + len(LANGUAGES) - 1  # dialogue needs a chat template
    assert (reason or "the Hub answers") in made.note


def test_the_model_writes_in_a_language(reader: Reader) -> None:
    """From that language's sentences in turn, and twice the same."""
    found = read(reader, "prose-ru", 400)
    starts: Sequence[str] = sentences("ru")
    assert len(found.documents) == 3 and found.source == "sampled from the model itself"
    for text, start in zip(found.documents, starts, strict=False):
        assert text.startswith(start) and len(text) > len(start)
    assert read(reader, "prose-ru", 400) == found
    assert not read(reader, "prose", 400).documents[0].startswith(starts[0])


def test_files_are_named_without_their_folders(tmp_path: Path, reader: Reader) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(f"{i} " + "word " * 500 for i in range(9)), "utf-8")
    made = reader.mix(str(path), 1000, 100)
    assert [(d.name, d.source) for d, _ in made.domains] == [("notes.txt", "notes.txt")]
    assert str(tmp_path) not in made.note and mix.shown(f"docs,{path}") == "docs,notes.txt"


def test_a_text_that_does_not_come_is_replaced_and_said(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of auto alone: what was named is not replaced by anything."""

    def hub_text(name: str, *_: Any) -> Iterator[str]:
        if name == "c4":
            raise QuantkitError("The dataset allenai/c4 cannot be read.")
        yield from (f"{name} {i} " * 40 for i in range(200))

    monkeypatch.setattr(sources, "hub_text", hub_text)
    wanted = [(Request("fineweb-edu", 2), 300), (Request("c4", 1), 300)]
    (edu, instead), remarks = reader.read(wanted, may_replace=True)
    assert edu.documents[0].startswith("fineweb-edu") and instead.documents
    assert remarks == [
        "Python's documentation instead of c4: The dataset allenai/c4 cannot be read"
    ]
    with pytest.raises(QuantkitError, match="allenai/c4"):
        reader.read(wanted)


def test_auto_outlasts_what_replaces_its_texts(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub that answers but has no datasets, as a mirror: CPython's documentation is finite."""

    def hub_text(name: str, *_: Any) -> Iterator[str]:
        raise QuantkitError(f"The dataset {name} cannot be read.")

    monkeypatch.setattr(hub, "why_offline", lambda token: None)
    monkeypatch.setattr(sources, "hub_text", hub_text)
    monkeypatch.setattr(Reader, "_written", _documents)
    _needs(monkeypatch, knowledge.MOST_BITS)
    profile = PROFILES["standard"]
    n_tokens = profile.calibration_tokens + profile.heldout_tokens
    made = reader.mix("auto", n_tokens, profile.eval_windows * N_CTX)
    texts = [set(domain.documents) for domain, _ in made.domains]
    assert all(texts) and sum(map(len, texts)) == len(set.union(*texts))
    assert {"docs", "code", "prose"} == {domain.name for domain, _ in made.domains}
    assert sum(weight for _, weight in made.domains) == pytest.approx(1)
    assert "Python's documentation instead of fineweb-edu: The dataset" in made.note
    assert "nothing instead of lang-de: The dataset" in made.note
