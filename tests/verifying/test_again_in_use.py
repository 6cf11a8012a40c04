"""Conversations and answers: what validate measures of tiny models follows from the receipt, is
found again, and does not pass when somebody changes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import NOISY, ONE, TinySpec, write_tiny
from test_receipt import receipt, write_value

from evaluators.overlap import Seen
from quantkit.config import PROFILES
from quantkit.evidence.baselines import Baseline, as_it_is
from quantkit.evidence.devices import Device
from quantkit.evidence.in_use import InUse
from quantkit.evidence.receipt import Receipt, read, to_json
from quantkit.evidence.receipt.claims import Claims
from quantkit.evidence.receipt.schema import Changed
from quantkit.evidence.report.measures import Measures
from quantkit.evidence.report.schema import OURS, Base, Output, Report, Row
from quantkit.verifying import figures_in_use
from quantkit.verifying.again_in_use import AgainInUse
from quantkit.verifying.findings import Finding

NAME = "a.gguf"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENOUGH = TinySpec(n_ctx_train=8192, template=CHATML)
TALKS, ANSWERS = f"{NAME}, KL in conversations", f"{NAME}, answers"


@dataclass(frozen=True)
class Made:
    """What was measured, and of which files."""

    base: Path
    file: Path
    receipt: Receipt
    report: Report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("in-use")
    base = write_tiny(folder / "base.gguf", ENOUGH)
    noisy = replace(NOISY, noise=0.1, n_ctx_train=8192, template=CHATML)
    file = write_tiny(folder / NAME, noisy)
    effort = replace(PROFILES["demo"].effort, answers=(8, 12), documents=1)
    measures, claims = Measures(), Claims()
    kept = folder / "validate" / "kept"
    kept.mkdir(parents=True)
    with ExitStack() as stack:
        in_use = InUse(base, effort, ONE, measures, kept, stack, Seen(["nothing"]), claims)
        in_use.ask_original(lambda *_: None)
        ours = Baseline(OURS, NAME, lambda: as_it_is(file), is_rival=True)
        found = in_use.of(ours, file, lambda *_: None)
    assert measures.missing == []
    row = Row(kind=OURS, name=NAME, n_bytes=file.stat().st_size, bpw=32.0, domains={}, **found)
    report = Report(
        model="owner/Tiny",
        base=Base(n_bytes=1, n_parameters=1, speed=None, floor=in_use.floor),
        protocol="",
        n_windows=None,
        texts={},
        documents=in_use.documents,
        outputs=(Output(**vars(row)),),
        baselines=(),
    )
    claimed = replace(
        receipt(),
        used_talks=claims.used_talks,
        talks=tuple(claims.talks),
        used_prompts=claims.used_prompts,
        replies=tuple(claims.replies),
    )
    yield Made(base, file, claimed, report)


def again(made: Made, claimed: Receipt, folder: Path) -> dict[str, Finding]:
    device = Device(ONE, ONE, "CPU")
    checks = AgainInUse(claimed, {NAME: made.file}, device, folder, lambda _: None)
    n_talks, n_prompts = len(made.receipt.talks[0].kl), len(made.receipt.replies[0].tokens)
    found = [
        *checks.talks(made.base, range(0, n_talks, 2)),
        *checks.answers(made.base, range(n_prompts)),
    ]
    return {finding.name: finding for finding in found}


def wrong(claimed: Receipt, report: Report) -> list[str]:
    both = *figures_in_use.floor(claimed, report), *figures_in_use.pairs(claimed, report.first)
    return [
        name for name, a, b in both if (a is None) != (b is None) or abs((a or 0) - (b or 0)) > 1e-6
    ]


def test_figures_follow_from_the_receipt(made: Made, tmp_path: Path) -> None:
    path = write_value(tmp_path / "receipt.json", to_json(made.receipt))
    assert read(path)[0] == made.receipt
    assert {t.kind for t in made.receipt.talks} == {"ours", "base"}
    assert figures_in_use.are_same(made.receipt, made.report)
    assert wrong(made.receipt, made.report) == []
    (finding,) = figures_in_use.check_answers(made.receipt, made.report)
    assert finding.passed, finding.about
    answers = made.report.first.answers
    assert answers is not None and 0 < answers.agreement.value < 1


def test_changed_figures_do_not(made: Made) -> None:
    output = made.report.first
    spoken = dict(output.conversations or {})
    better = replace(
        spoken["all"], kl=replace(spoken["all"].kl, value=0.5 * spoken["all"].kl.value)
    )
    changed = replace(output, conversations={**spoken, "all": better})
    assert wrong(made.receipt, replace(made.report, outputs=(changed,))) == ["the KL in all"]
    assert output.answers is not None
    for field in dataclasses.fields(output.answers):
        value = getattr(output.answers, field.name)
        if dataclasses.is_dataclass(value) and hasattr(value, "value"):
            more = replace(value, value=value.value / 2 + 0.1)
            forged = replace(output, answers=replace(output.answers, **{field.name: more}))
            (finding,) = figures_in_use.check_answers(
                made.receipt, replace(made.report, outputs=(forged,))
            )
            assert finding.passed is False and field.name in finding.about


def test_all_is_found_again(made: Made, tmp_path: Path) -> None:
    found = again(made, made.receipt, tmp_path)
    assert {TALKS, f"{TALKS}, equal tokens", ANSWERS, "the original's answers"} < {*found}
    assert "the engine's floor in conversations" in found
    assert f"{NAME}, weight KL in conversations" in found
    for finding in found.values():
        assert finding.passed, finding
    assert found[TALKS].again == pytest.approx(found[TALKS].claimed, rel=1e-5)


def other(made: Made, kind: str, change: Callable[[Any], Any], part: str = "replies") -> Receipt:
    rows: Sequence[Any] = getattr(made.receipt, part)
    changed = tuple(change(r) if r.kind == kind else r for r in rows)
    return replace(made.receipt, **{part: changed})


def test_what_is_made_up_is_not(made: Made, tmp_path: Path) -> None:
    base = next(r for r in made.receipt.replies if r.kind == "base")

    def failed(claimed: Receipt) -> set[str]:
        found = again(made, claimed, tmp_path)
        return {name for name, finding in found.items() if finding.passed is False}

    def of_base(r: Any) -> Any:
        return replace(r, tokens=base.tokens, ended=base.ended, texts=base.texts)

    assert failed(other(made, "ours", of_base)) == {ANSWERS}
    agreed = f"{NAME}, same next token on the original's answers"
    most = tuple(map(len, base.tokens))
    assert failed(other(made, "ours", lambda r: replace(r, agreed=most))) == {agreed}
    text = other(made, "ours", lambda r: replace(r, texts=("{}", *r.texts[1:])))
    assert failed(text) == {ANSWERS}
    unknown = other(made, "ours", lambda r: replace(r, tokens=((10**6,) * 12, *r.tokens[1:])))
    assert failed(unknown) == {ANSWERS}
    ended = other(made, "ours", lambda r: replace(r, ended=tuple(not e for e in r.ended)))
    assert failed(ended) == {ANSWERS}
    closer = other(made, "ours", lambda t: replace(t, kl=tuple(k / 2 for k in t.kl)), "talks")
    assert TALKS in failed(closer)


def test_other_prompts_are_not_looked_at(made: Made, tmp_path: Path) -> None:
    """Those of another version: neither right nor wrong."""
    asked, talks = made.receipt.used_prompts, made.receipt.used_talks
    assert asked is not None and talks is not None
    claimed = replace(
        made.receipt,
        used_prompts=replace(asked, sha256="ab" * 32),
        used_talks=replace(talks, sha256="ab" * 32),
    )
    assert {f.passed for f in again(made, claimed, tmp_path).values()} == {None}
    renamed = replace(asked, names=("none", *asked.names[1:]))
    (finding,) = figures_in_use.check_answers(
        replace(made.receipt, used_prompts=renamed), made.report
    )
    assert finding.passed is None


def test_counts_that_do_not_belong_together(made: Made, tmp_path: Path) -> None:
    for part, change in (
        ("used_talks", {"n_scored": [1]}),
        ("used_prompts", {"begun": []}),
        ("used_prompts", {"n": 1}),
        ("used_prompts", {"n_new": 3}),
    ):
        value = to_json(made.receipt)
        value[part] |= change
        with pytest.raises(Changed):
            read(write_value(tmp_path / "r.json", value))
    for part, change in (
        ("talks", {"kl": [0.1]}),
        ("replies", {"ended": [True]}),
        ("replies", {"tokens": [[]] * 8}),
        ("replies", {"agreed": []}),
    ):
        value = to_json(made.receipt)
        value[part][0] |= change
        with pytest.raises(Changed):
            read(write_value(tmp_path / "r.json", value))
