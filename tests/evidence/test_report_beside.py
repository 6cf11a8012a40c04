"""What report and card say of answers beside the original's and of KL in conversations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_report import OURS, family, values

from evaluators.figures import AnswersBeside, Estimate, OnDocuments, Share, SideBySide, Thinking
from evaluators.stats import sign_test, wilson
from quantkit.evidence import report
from quantkit.evidence.report import beside
from quantkit.evidence.report.schema import to_json


def share(n_yes: int, n: int) -> Share:
    return Share(n_yes / n, wilson(n_yes, n), n_yes, n)


def both(base: int, file: int, n: int) -> SideBySide:
    p_value = sign_test(max(base - file, 0), max(file - base, 0))
    return SideBySide(share(base, n), share(file, n), p_value)


ANSWERS = AnswersBeside(
    n_prompts=40,
    n_left_out=1,
    n_new=128,
    n_tokens=3000,
    prompts_sha256="ab" * 32,
    asked="chat template",
    identical=share(12, 40),
    before_difference=Estimate(41.25, (30.0, 55.0), 40),
    agreement=Estimate(0.9412, (0.92, 0.96), 40),
    length=Estimate(1.02, (0.97, 1.08), 40),
    unfinished=both(3, 12, 40),
    loops=both(0, 1, 40),
    tool_calls=both(5, 4, 6),
    same_calls=share(4, 5),
    json=both(4, 4, 4),
)


def documents(mean: float, n: int = 24) -> OnDocuments:
    near = (0.5 * mean, 2 * mean) if n > 2 else None
    of = {name: Estimate(mean * k, near, n) for name, k in (("kl", 1), ("median", 0.5))}
    tails = {name: Estimate(mean * k, near, n) for name, k in (("p99", 9), ("p999", 30))}
    top1 = Estimate(0.91, (0.9, 0.92), n)
    return OnDocuments(**of, **tails, max=2.0, top1=top1, n_tokens=n * 100)


def measured(value: dict[str, Any]) -> dict[str, Any]:
    """A report in which ours and the nearest smaller llama.cpp file were asked."""
    for row, k in ((value["outputs"][0], 1.0), (value["baselines"][1], 2.0)):
        row["answers"] = to_json(ANSWERS)
        row["conversations"] = {
            "chat": to_json(documents(0.01 * k, 2)),
            "all": to_json(documents(0.02 * k)),
        }
        row["weight_conversations"] = {"all": to_json(Estimate(0.015 * k, None, 24))}
    value["base"]["floor"] = {"all": to_json(documents(0.0001))}
    value["documents"] = {
        "n": 56,
        "n_tokens": 20_000,
        "n_scored": 9_000,
        "sha256": "cd" * 32,
        "asked": "chat template",
        "left_out": dict.fromkeys(("tools", "Thai"), "The template <breaks>."),
        "overlap": {"n": 100, "n_seen": 2, "share": 0.02},
    }
    return value


def test_it_is_read_as_it_is_written() -> None:
    found = report.read(measured(values()))
    assert found.first.answers == ANSWERS
    assert found.first.conversations is not None
    assert found.first.conversations["all"] == documents(0.02)
    assert report.read(to_json(found)) == found


def test_answers_in_words() -> None:
    found = report.read(measured(values()))
    own, how = beside.answer_lines(found)
    assert own.startswith("12 of 40 greedy answers are the original's word for word")
    assert "94.1 % (92.0 to 96.0) of the time" in own and "1.02 (0.97 to 1.08) times" in own
    assert "12 do not end within 128 tokens (original: 3): MORE than by chance (p = 0.0039)" in own
    assert "1 go in circles (original: 0)." in own
    assert "4 of 6 answers make calls that can be used (original: 5), 4 of 5 the very same" in own
    assert "4 of 4 answers are valid" in own
    assert how.startswith("Answers have at most 128 tokens") and "1 prompts did not fit" in how
    made = beside.answer_table(found)
    assert made is not None and made.headers[1:] == ("llama.cpp Q5_1 pure", OURS)
    cells = {line.cells[0]: line.cells[2] for line in made.lines}
    assert cells["same answer, word for word"] == "12 of 40 (18 to 45 %)"
    assert cells["unfinished (original)"] == "12 of 40 (3, p = 0.0039)"
    assert cells["going in circles (original)"] == "1 of 40 (0)"


def test_what_no_prompt_asked_for_is_left_out() -> None:
    value = measured(values())
    less = replace(ANSWERS, tool_calls=None, same_calls=None, json=None)
    thought = Thinking(3, Estimate(1.5, None, 3), both(3, 2, 3))
    value["outputs"][0]["answers"] = to_json(replace(less, thinking=thought, loops=both(0, 0, 40)))
    del value["baselines"][1]["answers"]
    found = report.read(value)
    made = beside.answer_table(found)
    assert made is not None
    names = [line.cells[0] for line in made.lines]
    assert not [name for name in names if "JSON" in name or "call" in name]
    assert names[-1].startswith("length of thinking")
    said = beside.answer_lines(found)[0]
    assert "circles" not in said and "It thinks 1.50 times as long." in said


def test_conversations_beside_the_file_that_is_compared_with() -> None:
    found = report.read(measured(values()))
    (made,) = beside.conversation_tables(found)
    assert made.headers[:6] == (
        *("KL in conversations", "documents", "tokens", "mean KL", "weight KL", "floor"),
    )
    assert made.headers[-1] == "llama.cpp Q5_1 pure"
    chat, everything = (line.cells for line in made.lines)
    assert chat[:6] == ("chat", "2", "200", "0.0100", "-", "-"), "no interval of two"
    assert everything[3:6] == ("0.0200 (0.0100 to 0.0400)", "0.0150", "0.000100")
    assert everything[-1] == "0.0400 (0.0200 to 0.0800)"
    first, floor, seen, left_out = beside.conversation_lines(found)
    assert "9,000 scored tokens" in first and "0.000100" in floor
    assert seen.startswith("2 of 100 runs") and left_out.startswith("Left out, tools, Thai: ")


@pytest.mark.parametrize("make", [report.markdown, report.html])
def test_it_stands_in_every_report(make: Any) -> None:
    said = make(report.read(measured(values())))
    assert beside.HEADING in said and beside.IN_CONVERSATIONS in said
    assert "12 of 40 (18 to 45 %)" in said and "##  " not in said
    assert ("<breaks>" in said) == (make is report.markdown), "a stranger's words are escaped"
    without = make(report.read(values()))
    assert beside.HEADING not in without and beside.IN_CONVERSATIONS not in without


def test_several_files_have_their_own_tables() -> None:
    value = measured(family())
    value["outputs"][1]["conversations"] = {"all": to_json(documents(0.003))}
    value["outputs"][1]["answers"] = to_json(ANSWERS)
    found = report.read(value)
    small, large = beside.conversation_tables(found)
    assert small.headers[0] == f"KL in conversations of {OURS}"
    assert large.headers[0].endswith("of Tiny-EVO-Q6_K.gguf")
    assert all(len(line.cells) == len(t.headers) for t in (small, large) for line in t.lines)
    assert [line.split(":")[0] for line in beside.answer_lines(found)[:2]] == [
        OURS,
        "Tiny-EVO-Q6_K.gguf",
    ]
