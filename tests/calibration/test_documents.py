"""Calibration text: split by document without leaks, packed and interleaved; specs and readers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibration import sources
from quantkit.calibration.documents import (
    PARTS,
    Domain,
    interleave,
    n_interleaved,
    pack,
    split,
    unpack,
    without,
)
from quantkit.config.calibration import (
    BUILTIN_TEXTS,
    HUB_TEXTS,
    MIXES,
    Request,
    language_of,
    parse_spec,
)
from quantkit.config.languages import LANGUAGES
from quantkit.errors import QuantkitError, UsageError
from quantkit.tensors import to_json

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=200)
documents = st.lists(texts, min_size=3, max_size=30, unique=True).map(tuple)


def lines(n: int, seed: int = 0) -> tuple[str, ...]:
    """Documents of varied length, all different."""
    rng = np.random.default_rng(seed)
    return tuple(f"{i} " + "x" * int(rng.integers(50, 900)) for i in range(n))


@given(documents, st.integers(0, 99))
def test_every_document_is_in_exactly_one_part(docs: tuple[str, ...], seed: int) -> None:
    parts = split(Domain("d", "s", docs), seed)
    assert set(parts) == set(PARTS)
    together = [text for part in parts.values() for text in part]
    assert Counter(together) == Counter(docs)
    for part in parts.values():
        assert list(part) == sorted(part, key=docs.index), "the order of a part is the domain's"


def test_every_part_has_a_document() -> None:
    """Two short documents and a long one: for some seeds eval takes both short ones."""
    domain = Domain("d", "s", ("a", "b", "c" * 1000))
    for seed in range(20):
        assert all(split(domain, seed).values()), seed


def test_equal_documents_do_not_leak() -> None:
    """Web text repeats itself; what is evaluated must not have been calibrated on."""
    docs = tuple(line for line in lines(40) for _ in range(3))
    for seed in range(10):
        parts = split(Domain("d", "s", docs), seed)
        for one in parts:
            for other in parts:
                assert one == other or not set(parts[one]) & set(parts[other])


def test_equal_documents_of_two_domains_do_not_leak() -> None:
    one, other = Domain("a", "a.txt", lines(30)), Domain("b", "b.txt", lines(60))
    apart = without(other, set(one.documents))
    assert apart.name == "b" and apart.documents == lines(60)[30:]
    with pytest.raises(QuantkitError, match="another text"):
        without(one, set(other.documents))


def test_shares_are_by_characters() -> None:
    parts = split(Domain("d", "s", lines(400)), 0)
    total = sum(map(len, lines(400)))
    for part, share in PARTS.items():
        assert sum(map(len, parts[part])) / total == pytest.approx(share, abs=0.02)
    assert sum(PARTS.values()) == pytest.approx(1)


def test_of_a_short_text_more_is_evaluated() -> None:
    """Enough for a window, but never so much that nothing is left to calibrate on."""
    for n, share in ((10, 0.30), (20, 0.30), (60, 4000)):
        docs = lines(n)
        total = sum(map(len, docs))
        wanted = share * total if share < 1 else share
        taken = sum(map(len, split(Domain("d", "s", docs), 0)["eval"]))
        assert wanted <= taken < wanted + 900


def test_seed_and_name_decide() -> None:
    domain = Domain("d", "s", lines(50))
    assert split(domain, 1) == split(domain, 1) != split(domain, 2)
    assert split(Domain("e", "s", lines(50)), 1)["eval"] != split(domain, 1)["eval"]


def test_adding_documents_moves_few() -> None:
    """A document keeps its rank: a tenth more text moves only those at the borders."""
    before = split(Domain("d", "s", lines(200)), 0)
    after = split(Domain("d", "s", (*lines(200), *(f"new {t}" for t in lines(20, 1)))), 0)
    moved = sum(text not in after[part] for part, chosen in before.items() for text in chosen)
    assert moved <= 20


def test_fewer_than_three_documents_are_for_training() -> None:
    for documents in (("a", "b"), ("a", "b", "a", "b"), ()):
        parts = split(Domain("d", "notes.txt", documents), 0)
        assert parts == {"train": documents, "heldout": (), "eval": ()}


class Bytes:
    """A tokenizer of bytes, with or without tokens put before and after a text."""

    def __init__(self, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> None:
        self.before, self.after = list(before), list(after)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> Bytes:
        ids = list(text.encode())
        self.input_ids = [*self.before, *ids, *self.after] if add_special_tokens else ids
        return self

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@given(st.lists(texts, max_size=8), st.integers(0, 6), st.integers(3, 40), st.booleans())
def test_packing(docs: list[str], n: int, n_tokens: int, with_bos: bool) -> None:
    """Rows are the stream of documents, cut; each begins as a text would."""
    tokenizer = Bytes((300,) if with_bos else ())
    rows = pack(docs, tokenizer, n, n_tokens)
    body = n_tokens - with_bos
    stream = list("".join(f"{d}\n\n" for d in docs).encode())
    n_rows = min(n, len(stream) // body)
    assert rows.dtype == np.int64 and rows.shape == (n_rows, n_tokens)
    assert (rows[:, :with_bos] == 300).all()
    assert rows[:, int(with_bos) :].flatten().tolist() == stream[: n_rows * body]
    assert unpack(rows, tokenizer) == tokenizer.decode(stream[: n_rows * body])


def test_a_token_at_the_end_is_not_the_beginning() -> None:
    """Tokenizers that add </s> after a text: rows must begin with <s>, not with the letter a."""
    rows = pack(["hello world " * 9], Bytes((300,), (301,)), 2, 10)
    assert rows[:, 0].tolist() == [300, 300] and rows[0, 1] == ord("h")


def blocks(counts: list[int]) -> list[np.ndarray]:
    return [np.full((n, 4), i) for i, n in enumerate(counts)]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.floats(0.01, 10)), min_size=1, max_size=5),
    st.integers(0, 60),
)
def test_interleaving(parts: list[tuple[int, float]], n: int) -> None:
    counts = [c for c, _ in parts]
    rows = interleave(blocks(counts), [w for _, w in parts], n)
    assert rows.shape == (min(n, sum(counts)), 4) and rows.dtype == np.int64
    taken = Counter(rows[:, 0].tolist())
    assert all(taken[i] <= c for i, c in enumerate(counts))
    found = n_interleaved(blocks(counts), [w for _, w in parts], n)
    assert found == [taken[i] for i in range(len(parts))]


def test_interleaving_keeps_to_the_weights_all_along() -> None:
    """Any beginning has the domains in proportion, to within one row each."""
    weights = [0.5, 0.3, 0.2]
    rows = interleave(blocks([100, 100, 100]), weights, 90)[:, 0]
    for n in range(1, 91):
        for i, weight in enumerate(weights):
            assert abs((rows[:n] == i).sum() - weight * n) <= 1.01


def test_a_domain_that_runs_out_leaves_its_share() -> None:
    rows = interleave(blocks([2, 50]), [0.5, 0.5], 30)[:, 0].tolist()
    assert rows.count(0) == 2 and rows.count(1) == 28


def test_rows_of_a_domain_stay_in_order() -> None:
    part = np.arange(40).reshape(10, 4)
    assert np.array_equal(interleave([part], [1.0], 10), part)


def test_specs() -> None:
    assert parse_spec("docs:2,code") == (Request("docs", 2.0), Request("code", 1.0))
    assert parse_spec(" docs , , notes.txt:0.5 ") == (Request("docs", 1), Request("notes.txt", 0.5))
    assert parse_spec("/data/a:b.jsonl") == (Request("/data/a:b.jsonl", 1.0),)
    assert parse_spec("prose-de,lang-hi") == (Request("prose-de", 1), Request("lang-hi", 1))


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_share_their_weight_among_texts(mix: str) -> None:
    parts = parse_spec(f"{mix}:2")
    assert {r.name for r in parts} <= {*HUB_TEXTS, *BUILTIN_TEXTS}
    assert sum(r.weight for r in parts) == pytest.approx(2)
    languages = [r for r in parts if r.language]
    assert all(r.if_known for r in languages) and not any(
        r.if_known for r in parts if not r.language
    )
    assert len(languages) in (0, len(LANGUAGES))


def test_without_languages_the_builtin_mix_is_the_english_one() -> None:
    kept = [r for r in parse_spec("builtin") if not r.language]
    english = parse_spec("english")
    assert [r.name for r in kept] == [r.name for r in english]
    total = sum(r.weight for r in kept)
    assert [r.weight / total for r in kept] == pytest.approx([r.weight for r in english])


def test_the_language_of_a_name() -> None:
    assert [language_of(n) for n in ("lang-de", "prose-zh")] == ["de", "zh"]
    others = ("prose", "docs", "lang-en", "prose-de.txt", "fineweb-edu", "code-hub")
    assert not any(map(language_of, others))


@pytest.mark.parametrize(
    "spec", ["", ",", "wiki", "docs:0", "docs:-1", "docs:nan", "docs:inf", "notes.pdf", "docs:x"]
)
def test_what_is_no_spec(spec: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_spec(spec)
    assert error.value.remedy


def test_auto_stands_alone() -> None:
    assert parse_spec(" auto ") == (Request("auto", 1),)
    for spec in ("auto:2,docs", "docs,auto", "auto,auto", "builtin,auto"):
        with pytest.raises(UsageError, match="cannot be combined"):
            parse_spec(spec)


def test_domains_drop_what_is_no_text() -> None:
    found = sources.domain("d", "s", ["", " \n", "short", "x" * 50 + "\0\n", "y" * 60])
    assert found.documents == ("x" * 50, "y" * 60)
    assert found.sha256 != sources.domain("d", "s", ["y" * 60]).sha256


def test_the_builtin_texts_are_there_and_do_not_overlap() -> None:
    """Offline, from CPython itself; documents in plenty, prose and code."""
    docs, code = (sources.builtin_text(name, 400_000) for name in ("docs", "code"))
    assert docs is not None and code is not None
    for found in (docs, code):
        assert len(found.documents) >= 30
        assert 390_000 < sum(map(len, found.documents)) < 450_000
        assert "CPython" in found.source
    assert not set(docs.documents) & set(code.documents)
    assert sum("def " in text for text in code.documents) > 0.8 * len(code.documents)
    assert sources.builtin_text("prose", 10) is None
    again = sources.builtin_text("code", 400_000)
    assert again is not None and again.sha256 == code.sha256


def test_the_description_of_a_mix() -> None:
    domain = Domain("d", "somewhere", ("ab", "c"))
    assert to_json(sources.Described.of(domain, 1 / 3, "d")) == {
        "name": "d",
        "source": "somewhere",
        "weight": 0.3333,
        "n_documents": 2,
        "n_characters": 3,
        "sha256": domain.sha256,
        "license": None,
        "held_out": "d",
    }
