"""Runs of 13 words that an evaluation text shares with what was calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluators import overlap
from evaluators.choice_items import shared_context
from evaluators.overlap import N_WORDS, Seen, words

PARTS = [f"word{i}" for i in range(40)]
TEXT = " ".join(PARTS)


def test_words_are_what_people_read() -> None:
    assert words("The cat’s MAT, re-used: x_1 = 3.5!") == "the cat s mat re used x 1 3 5".split()
    assert words("héllo ﬁne") == ["héllo", "fine"]  # a ligature is two letters
    assert words("हिन्दी में") == ["हिन्दी", "में"], "vowel signs belong to their word"
    assert words("日本語 test") == ["日", "本", "語", "test"]


def test_a_copy_is_found_however_it_is_set() -> None:
    seen = Seen([TEXT])
    copy = ",\n".join(PARTS).upper()
    found = seen.overlap(copy)
    assert (found.n, found.n_seen, found.share) == (28, 28, 1.0)
    changed = PARTS.copy()
    changed[20] = "other"  # every run that holds it is lost: 13 of 28
    assert seen.overlap(" ".join(changed)).n_seen == 28 - N_WORDS


def test_the_count_is_that_of_plain_sets() -> None:
    """Against runs as tuples, on words that come again and again."""
    a, b = ([f"w{i * i % m}" for i in range(3000)] for m in (97, 89))
    runs = {tuple(a[i : i + N_WORDS]) for i in range(len(a) - N_WORDS + 1)}
    text = a[500:800] + b + a[:100]
    wanted = [tuple(text[i : i + N_WORDS]) in runs for i in range(len(text) - N_WORDS + 1)]
    found = Seen([" ".join(a)]).overlap(" ".join(text))
    assert found.n == len(wanted) and found.n_seen == sum(wanted) > 300


def test_texts_are_not_joined() -> None:
    halves = [" ".join(PARTS[:20]), " ".join(PARTS[20:])]
    assert Seen(halves).overlap(TEXT).n_seen == 2 * (20 - N_WORDS + 1)


def test_short_texts_have_no_runs() -> None:
    found = Seen(["few words"]).overlap("few words")
    assert (found.n, found.n_seen, found.share) == (0, 0, 0.0)
    assert Seen([]).overlap(TEXT).n_seen == 0


def test_items_that_overlap_are_counted() -> None:
    seen = Seen([TEXT])
    long = shared_context(" ".join(PARTS[3:15]), ["word15", "nothing"], 0)  # 13 with its answer
    spoiled = shared_context(" ".join(PARTS[3:14]), ["nothing", "none"], 0)
    whole = shared_context(" ".join(PARTS[:8]), ["word8", "x"], 0)  # 9 words: as a whole
    part = shared_context(" ".join(PARTS[:8]), ["y", "x"], 0)
    short = shared_context("word0 word1", ["word2", "word3"], 0)
    found = seen.overlap_of_items([long, spoiled, whole, part, short])
    assert (found.n_items, found.n_short, found.n_seen) == (5, 1, 2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seen.txt").write_text(TEXT)
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"context": TEXT, "choices": ["a", "b"], "gold": 0}) + "\n"
    )
    seen, items = str(tmp_path / "seen.txt"), str(tmp_path / "items.jsonl")
    command = ["--seen", seen, "--text", f"same={seen}", "--task", "choices", "--data", items]
    assert overlap.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == {"same": {"n": 28, "n_seen": 28, "share": 1.0}}
    assert found["tasks"]["items"] == {"n_items": 1, "n_short": 0, "n_seen": 1}
    assert overlap.main([*command, "--table"]) == 0
    assert "1 of 1 items overlap" in capsys.readouterr().out
    assert overlap.main(["--seen", seen]) == 1
