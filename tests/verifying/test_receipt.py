"""Receipts that strangers wrote, what is drawn from them, and what findings come to."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.figures import WindowMeans
from quantkit.calibration.mix import _file
from quantkit.config.calibration import BUILTIN_TEXTS, HUB_TEXTS, license_of
from quantkit.errors import QuantkitError
from quantkit.evidence.receipt import Receipt, read, to_json, write
from quantkit.evidence.receipt.limits import TOLERANCE, beyond
from quantkit.evidence.receipt.make import LONG
from quantkit.evidence.receipt.schema import (
    Answers,
    Changed,
    Engine,
    FileSum,
    UsedText,
    UsedTokens,
    Windows,
    sum_of,
)
from quantkit.verifying.base import find_base
from quantkit.verifying.draw import everything, sample
from quantkit.verifying.findings import Finding, Verdict, render

SHA = "ab" * 32


def receipt(n_windows: int = 3) -> Receipt:
    means = WindowMeans(*((0.5,) * n_windows for _ in range(4)))
    return Receipt(
        model="owner/Tiny",
        source="owner/Tiny",
        revision="c0ffee",
        seed=0,
        commands=("quantkit verify .",),
        versions={},
        engine=Engine("0.3.36", "0.25 abc", "AVX2 = 1", "CPU", 2),
        base=FileSum(5, SHA),
        files={"a.gguf": FileSum(3, SHA), "texts/docs.txt": FileSum(3, SHA)},
        texts=(
            UsedText(name="docs", sha256=SHA, source="here", license="MIT", file="texts/docs.txt"),
            UsedText(name="code", sha256=SHA, source="there"),
            UsedText(name=LONG, sha256="", source="joined", joins=("docs", "code")),
        ),
        tokens=(
            UsedTokens("docs", 512, n_windows, SHA),
            UsedTokens("code", 512, n_windows, SHA),
            UsedTokens(LONG, 4096, 1, SHA),
        ),
        windows=(
            Windows("a.gguf", "ours", "kl", "docs", 512, means),
            Windows("a.gguf", "ours", "kl", "code", 512, means),
        ),
        answers=(Answers("a.gguf", "ours", "piqa", "piqa", False, SHA, (0, 1), (0, 1)),),
        tolerance=TOLERANCE,
        not_covered=("speed",),
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "receipt.json", receipt())
    found, sha256 = read(path)
    assert found == receipt()
    assert sha256 == json.loads(path.read_text())["sha256"]
    path.write_text(json.dumps(json.loads(path.read_text()), indent=None))  # set otherwise
    assert read(path) == (receipt(), sha256)


def write_value(path: Path, value: dict[str, Any]) -> Path:
    """With a sum that is right, as a stranger can make it."""
    path.write_text(json.dumps({**value, "sha256": sum_of(value)}))
    return path


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a//b", "a/../b", ".", "a\x1b[2J", "x" * 301]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    value = to_json(receipt())
    value["files"][name] = {"n_bytes": 1, "sha256": SHA}
    with pytest.raises(Changed, match="names a file"):
        read(write_value(tmp_path / "r.json", value))
    value = to_json(receipt())
    value["texts"][0]["file"] = name
    with pytest.raises(Changed, match="names a file"):
        read(write_value(tmp_path / "r.json", value))


def test_counts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for part, index, change in (
        ("windows", 0, {"text": "other"}),
        ("windows", 0, {"n_ctx": 4096}),
        ("windows", 0, {"means": {"kl": [1.0], "nll": [], "base_nll": [], "top1": []}}),
        ("windows", 0, {"means": dict.fromkeys(("kl", "nll", "base_nll", "top1"), [0.5] * 4)}),
        ("tokens", 0, {"n_windows": 0}),
        ("tokens", 0, {"n_windows": 10**9}),
        ("tokens", 0, {"n_ctx": 10**9}),
        ("tokens", 0, {"text": "other"}),
        ("answers", 0, {"picks": [0]}),
        ("answers", 0, {"picks": [], "base_picks": []}),
        ("answers", 0, {"picks": ["x", "y"]}),
    ):
        value = to_json(receipt())
        value[part][index] |= change
        with pytest.raises(Changed):
            read(write_value(tmp_path / "r.json", value))


def test_bounds_of_counts(tmp_path: Path) -> None:
    """So that nothing that goes over all of them takes long."""
    for part, n in (("texts", 1001), ("tokens", 1001), ("windows", 5001), ("answers", 1001)):
        value = to_json(receipt())
        value[part] = [value[part][0]] * n
        with pytest.raises(Changed, match="holds too much"):
            read(write_value(tmp_path / "r.json", value))


def test_bounds_of_size_and_depth(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(Changed, match="nested"):
        read(write_value(tmp_path / "r.json", {**to_json(receipt()), "more": deep}))
    (tmp_path / "r.json").write_bytes(b" " * 32_000_001)
    with pytest.raises(Changed, match="larger than"):
        read(tmp_path / "r.json")
    with pytest.raises(QuantkitError, match="cannot be read"):
        read(tmp_path / "none.json")


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_a_sample_is_of_what_there_is(n: int, seed: int) -> None:
    made = receipt(5)
    drawn = sample(made, ("docs", "code", LONG), n, seed)
    (windows,) = drawn.windows.values()  # the short context alone
    assert sum(map(len, windows.values())) == min(n, 10)
    assert all(0 <= i < 5 for which in windows.values() for i in which)
    assert all(which and list(which) == sorted(set(which)) for which in windows.values())
    assert drawn == sample(made, ("docs", "code", LONG), n, seed)
    assert f"--seed {seed}" in drawn.sentence


def test_every_window_can_be_drawn() -> None:
    """About equally often, so that nothing is safe from being looked at."""
    counts: Counter[tuple[str, int]] = Counter()
    for seed in range(1000):
        for text, which in sample(receipt(5), ("docs", "code"), 2, seed).windows[512].items():
            counts.update((text, i) for i in which)
    assert len(counts) == 10 and min(counts.values()) > 130 and max(counts.values()) < 270


def test_texts_that_are_not_at_hand_are_not_drawn() -> None:
    assert sample(receipt(), ("docs",), 8, 0).windows == {512: {"docs": (0, 1, 2)}}
    assert sample(receipt(), (), 8, 0).windows == {}
    assert everything(receipt(), ("docs", "code", LONG)).windows == {
        512: {"docs": (0, 1, 2), "code": (0, 1, 2)},
        4096: {LONG: (0,)},
    }


def test_wider_limits_are_named() -> None:
    assert beyond(TOLERANCE) == []
    assert beyond(dataclasses.replace(TOLERANCE, kl=TOLERANCE.kl / 2)) == []
    for field in dataclasses.fields(TOLERANCE):
        wide = {field.name: 1.01 * getattr(TOLERANCE, field.name)}
        assert beyond(dataclasses.replace(TOLERANCE, **wide)) == [field.name]
        assert beyond(dataclasses.replace(TOLERANCE, **{field.name: -1.0})) == [field.name]


def test_what_did_not_run_has_not_passed() -> None:
    good, bad, left = (Finding(str(state), state, "why") for state in (True, False, None))
    assert Verdict("x", (good,)).status == 0
    assert Verdict("x", (good, left)).status == 2 and "Could NOT" in Verdict("x", (left,)).sentence
    assert Verdict("x", (good, left, bad)).status == 1
    assert Verdict("x", ()).status == 2
    assert "NOT verified: False" in Verdict("x", (bad, left)).sentence
    steering = Verdict("\x1b]0;owned\x07", (Finding("a", True, "\x1b[2J", 1.0, 1.0, 0.1),))
    assert "\x1b" not in render(steering) and "| a | 1 | 1 | 0.1 | ok |" in render(steering)


def test_only_texts_with_a_license_are_published(tmp_path: Path) -> None:
    assert license_of("docs") == "PSF-2.0" and license_of("c4") == "ODC-By 1.0"
    assert license_of("code-hub") is None, "the Stack's files have many"
    assert all(license_of(name) for name in {*BUILTIN_TEXTS, *HUB_TEXTS} - {"code-hub"})
    mine = tmp_path / "docs"  # a file of the user's with the name of a built-in text
    mine.write_text("my own words. " * 100)
    domain, _ = _file(mine, 1000)
    assert domain.name == "docs" and domain.license is None


@pytest.mark.parametrize(
    ("source", "revision", "why"),
    [
        (None, "c0ffee" * 6 + "abcd", "does not give"),
        ("owner/Tiny", "main", "names no commit"),
        ("owner/Tiny", None, "names no commit"),
        ("/etc", "c0ffee" * 6 + "abcd", "Local folders cannot be used"),
        ("../../x", "c0ffee" * 6 + "abcd", "Local folders cannot be used"),
    ],
)
def test_a_base_that_cannot_be_made_again(
    tmp_path: Path, source: str | None, revision: str | None, why: str
) -> None:
    """A receipt leads to no folder of this machine, and to no branch that may move."""
    made = dataclasses.replace(receipt(), source=source, revision=revision)
    found = find_base(made, None, tmp_path / "base", lambda _: None)
    assert found.path is None and found.finding.passed is None
    assert why in found.finding.about and not (tmp_path / "base").exists()
