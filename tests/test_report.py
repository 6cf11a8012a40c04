"""The report's words and tables: ours beside theirs, wins and losses said alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from quantkit import report

KL = {"mean": 0.0123, "stderr": 0.0004}


def row(**changes: Any) -> dict[str, Any]:
    """One file's figures."""
    values = {
        "n_bytes": 1_000_000,
        "bpw": 4.5,
        "kl": KL,
        "top1": 0.912,
        "perplexity": {"value": 12.3456, "stderr": 0.1},
        "domains": {"docs": {"kl": KL}, "code": {"kl": {"mean": 0.00002, "stderr": 0.1}}},
    }
    return {**values, **changes}


def values() -> dict[str, Any]:
    ours = row(
        path="7-stitch/Tiny-EVO-Q4_K_M.gguf",
        zero_shot={"status": "not run", "reason": "no --tasks file"},
    )
    return {
        "model": "owner/Tiny",
        "outputs": [ours],
        "baselines": [
            row(name="Q4_K_S", n_bytes=900_000, kl={"mean": 0.05, "stderr": 0.001}),
            row(name="Q5_1 --pure", n_bytes=990_000, kl={"mean": 0.0246, "stderr": 0.001}),
            row(name="Q4_K_M", n_bytes=1_100_000, kl={"mean": 0.001, "stderr": 0.001}),
        ],
        "base": {
            "n_bytes": 4_000_000,
            "n_parameters": 2_000_000,
            "perplexity": {"value": 11.0, "stderr": 0.1},
        },
        "protocol": "llama.cpp",
        "texts": {"docs": "ab", "code": "cd"},
        "calibration": {"note": "built-in text"},
        "fallbacks": [],
        "unmapped": [],
    }


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_comparison_is_by_size_and_marks_ours() -> None:
    lines = report.comparison(values()).splitlines()
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    names = [cells(line)[0] for line in lines[2:]]
    assert names == [
        "llama.cpp Q4_K_S, same imatrix",
        "llama.cpp Q5_1 --pure, same imatrix",
        "**Tiny-EVO-Q4_K_M.gguf**",
        "llama.cpp Q4_K_M, same imatrix",
        "full precision",
    ]
    assert cells(lines[4])[1:] == ["1,000,000", "4.50", "0.0123 ± 0.00040", "91.2 %", "12.346"]
    assert cells(lines[-1])[1:] == ["4,000,000", "16.00", "0", "100 %", "11.000"]


def test_the_verdict_is_against_the_best_file_of_at_most_our_size() -> None:
    found = report.verdict(values())
    assert "Q5_1 --pure" in found and "0.50 times" in found and "(less)" in found
    assert "Q4_K_M," not in found, "larger files are no fair opponent"


def test_a_loss_is_said_plainly() -> None:
    worse = values()
    worse["outputs"][0]["kl"] = {"mean": 0.0738, "stderr": 0.001}
    assert "3.00 times" in report.verdict(worse) and "(MORE)" in report.verdict(worse)


def test_nothing_as_small() -> None:
    alone = values()
    alone["baselines"] = alone["baselines"][2:]
    assert report.verdict(alone) == "No llama.cpp file is as small as this one."
    assert "full precision" in report.comparison(alone)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5000"),
        (0.0506, "0.0506"),
        (0.00431, "0.00431"),
        (0.000431, "0.00043"),
        (0.0000431, "4.31e-05"),
    ],
)
def test_digits_that_mean_something(value: float, text: str) -> None:
    assert report.number(value) == text


def test_sizes_for_people() -> None:
    assert report.size(105_454_144) == "105.5 MB"
    assert report.size(15_500_000_000) == "15.50 GB"


def test_gigabytes_begin_at_one() -> None:
    assert report.size(5_500_000_000) == "5.50 GB"


def test_domains_one_column_each() -> None:
    lines = report.domains(values()).splitlines()
    assert cells(lines[0]) == ["mean KL on", "docs", "code"]
    assert cells(lines[2]) == ["Tiny-EVO-Q4_K_M.gguf", "0.0123", "2.00e-05"]
    assert len(lines) == 2 + 4


def test_zero_shot_run_and_not_run() -> None:
    assert report.zero_shot(values()) == "Zero-shot: not run (no --tasks file)."
    done = values()
    accuracy = {"value": 0.62, "stderr": 0.031, "n": 200}
    done["outputs"][0]["zero_shot"] = {
        "status": "done",
        "task": "everyday",
        "acc": accuracy,
        "base": {"acc": {**accuracy, "value": 0.64}},
        "flips": {"acc": {"n": 7}},
    }
    assert report.zero_shot(done) == (
        "Zero-shot, everyday (200 items): 62.0 ± 3.1 %, full precision 64.0 %; 7 answers differ."
    )


def fallback(tensor: str, asked: str = "Q4_K", reason: str = "rows of 96") -> dict[str, str]:
    return {"tensor": tensor, "asked": asked, "used": "Q5_0", "reason": reason}


def test_fallbacks_are_grouped() -> None:
    changed = values()
    changed["fallbacks"] = [fallback("a"), fallback("b"), fallback("c", "Q5_K"), fallback("d")]
    lines = report.fallbacks(changed).splitlines()
    assert [cells(line) for line in lines[2:]] == [
        ["Q4_K", "Q5_0", "3", "rows of 96"],
        ["Q5_K", "Q5_0", "1", "rows of 96"],
    ]


def test_the_whole_report() -> None:
    text = report.markdown(values())
    assert text.startswith("# owner/Tiny\n") and text.endswith("\n")
    for part in ("0.50 times", "By domain", "not run", "built-in text", "docs, code"):
        assert part in text
    assert "Fallbacks" not in text and "not found in the model" not in text
    changed = values()
    changed["fallbacks"], changed["unmapped"] = [fallback("a")], ["blk.0.x", "blk.1.x"]
    text = report.markdown(changed)
    assert "## Fallbacks" in text and "blk.0.x, blk.1.x." in text


def test_nothing_is_changed() -> None:
    given = values()
    before = copy.deepcopy(given)
    report.markdown(given)
    assert given == before
