"""A published folder verified whole, and every way to change a file or a figure of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Answer, Run, quantkit

from quantkit.evidence.receipt import NAME
from quantkit.evidence.receipt.schema import sum_of
from quantkit.files import sha256_file
from quantkit.run.folder import read_json
from quantkit.verifying.findings import NOT_CHECKED, NOT_VERIFIED, VERIFIED, Verdict
from quantkit.verifying.verify import Asked, verify

pytestmark = pytest.mark.slow

GGUF = "Tiny-Llama-EVO-Q4_K_M.gguf"


@pytest.fixture
def run(whole_run: tuple[Run, Answer]) -> Run:
    return whole_run[0]


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """A copy of what would be published."""
    copy = tmp_path / "published"
    shutil.copytree(run.dir.artifacts.upload, copy)
    return copy


def look(folder: Path, base: Path | None = None, **asked: Any) -> Verdict:
    """Everything but measuring, where no base is given: that of a local model is not to be had."""
    return verify(Asked(str(folder), base=base, **asked), lambda _: None, lambda _: None)


def states(verdict: Verdict) -> dict[str, bool | None]:
    return {finding.name: finding.passed for finding in verdict.findings}


def failed(verdict: Verdict) -> set[str]:
    return {name for name, passed in states(verdict).items() if passed is False}


def change(path: Path, how: Callable[[Any], None]) -> None:
    """Change a JSON file as it is, the sum in it left alone."""
    value = read_json(path)
    how(value)
    path.write_text(json.dumps(value))


def forge(folder: Path, how: Callable[[Any], None]) -> None:
    """Change the receipt as somebody does who knows how it is made: sums and the card, too."""
    path, card = folder / NAME, folder / "README.md"
    value = read_json(path)
    before = value["sha256"]
    how(value)
    for name, stated in value["files"].items():
        there = folder / name
        if there.exists():
            stated |= {"n_bytes": there.stat().st_size, "sha256": sha256_file(there)}
    value["sha256"] = sum_of(value)
    path.write_text(json.dumps(value))
    card.write_text(card.read_text("utf-8").replace(before, value["sha256"]), "utf-8")


def test_a_published_folder_is_verified(run: Run, folder: Path, offline: dict[str, str]) -> None:
    """By the command line, with every window measured again."""
    base = ("--base", run.base)
    answer = quantkit("verify", folder, *base, "--full", "--json", env=offline)
    assert answer.code == VERIFIED, answer.out + answer.err
    found = {f["name"]: f for f in answer.json["findings"]}
    assert all(f["passed"] for f in found.values())
    kl = found[f"{GGUF}, KL"]
    assert kl["claimed"] == pytest.approx(run.report["outputs"][0]["kl"]["mean"], rel=1e-6)
    assert kl["again"] == pytest.approx(kl["claimed"], rel=1e-5)  # the same build on the same CPU
    assert found[f"{GGUF}, weight KL"]["again"] > 0
    for name in (f"{GGUF}, KL in conversations", f"{GGUF}, weight KL in conversations"):
        assert found[name]["again"] == pytest.approx(found[name]["claimed"], rel=1e-5)
    assert "the engine's floor in conversations" in found
    assert "nats on average" in found[f"{GGUF}, answers"]["about"]
    assert found["the original's answers"]["passed"] and found["answers of report.json"]["passed"]
    n_files = sum(p.is_file() for p in folder.rglob("*")) - 2  # but receipt and card
    assert found["files"]["about"].startswith(f"{n_files} of {n_files} files")
    assert answer.json["status"] == VERIFIED and answer.json["verdict"].startswith("Verified")
    shown = quantkit("verify", run.folder, *base, "--sample", "1", "--seed", "3", env=offline)
    assert shown.code == VERIFIED, shown.err
    assert "1 of 4 windows" in shown.out and "--seed 3" in shown.out
    assert f"| {GGUF}, KL |" in shown.out and "Not measured again: " in shown.out


def test_the_card_tells_how(run: Run) -> None:
    assert "quantkit verify <owner>/<repo>" in run.card
    receipt = read_json(run.dir.artifacts.upload / NAME)
    assert receipt["sha256"] in run.card


def test_the_receipt_says_what_was_measured(run: Run) -> None:
    receipt = read_json(run.dir.artifacts.upload / NAME)
    report = run.report
    assert receipt["base"]["sha256"] == sha256_file(run.base)
    assert {t["name"]: t["sha256"] for t in receipt["texts"]} == report["texts"]
    assert {t["license"] for t in receipt["texts"]} == {"PSF-2.0"}
    assert receipt["engine"]["device"] == "CPU" and "AVX" in receipt["engine"]["system"].upper()
    assert receipt["engine"]["llama_cpp_python"] == report["versions"]["llama-cpp-python"]
    assert any("evaluators.kl base.gguf" in command for command in receipt["commands"])
    names = {w["file"] for w in receipt["windows"]}
    assert names == {row["name"] for row in (*report["outputs"], *report["baselines"])}
    assert str(run.folder) not in json.dumps(receipt)


def test_without_the_base_nothing_counts_as_measured(folder: Path, offline: dict[str, str]) -> None:
    verdict = look(folder)
    assert verdict.status == NOT_CHECKED and not failed(verdict)
    assert states(verdict)["full-precision file"] is None
    assert verdict.sample == "Nothing was measured again."
    answer = quantkit("verify", folder, env=offline)
    assert answer.code == NOT_CHECKED and "Could NOT be checked" in answer.out


def test_another_base_is_not_the_one(run: Run, folder: Path) -> None:
    verdict = look(folder, base=folder / GGUF, n_windows=1)
    assert verdict.status == NOT_VERIFIED  # KL of a file from itself is nothing
    assert states(verdict)["full-precision file"] is None
    assert f"{GGUF}, KL" in failed(verdict)


def test_every_file_is_guarded(folder: Path) -> None:
    """One byte of each, one after the other."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert {GGUF, "report.json", "texts/docs.txt", "texts/code.txt"} < {*names}
    for name in set(names) - {NAME, "README.md"}:
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        verdict = look(folder)
        assert verdict.status == NOT_VERIFIED and name in failed(verdict), name
        path.write_bytes(data[:-1])
        assert name in failed(look(folder)), name
        path.unlink()
        assert name in failed(look(folder)), name
        path.write_bytes(data)
    assert not failed(look(folder))


def test_any_edit_of_the_receipt_is_seen(folder: Path) -> None:
    """Of every value in it, one after the other."""
    path = folder / NAME
    whole = read_json(path)
    n_edits = 0

    def edit(value: Any, name: Any) -> bool:
        item = value[name]
        if isinstance(item, (dict, list)):
            return False
        value[name] = f"{item}x" if isinstance(item, str) else (item or 0) + 1
        return True

    def walk(value: Any) -> None:
        nonlocal n_edits
        for name in list(value) if isinstance(value, dict) else range(min(len(value), 3)):
            before = value[name]
            if edit(value, name):
                path.write_text(json.dumps(whole))
                verdict = look(folder) if n_edits < 40 else None
                assert sum_of(whole) != whole["sha256"]
                assert verdict is None or failed(verdict) == {NAME}
                value[name] = before
                n_edits += 1
            else:
                walk(before)

    walk(whole)
    assert n_edits > 100


def test_a_receipt_that_is_none(folder: Path, offline: dict[str, str]) -> None:
    for data in (b"", b"{", b"[" * 10_000, b'{"schema": 1}', b'{"schema": 1, "sha256": 3}'):
        (folder / NAME).write_bytes(data)
        assert look(folder).status == NOT_VERIFIED, data[:20]
    newer: dict[str, Any] = {"schema": 3}  # whole, and not to be understood
    (folder / NAME).write_text(json.dumps({**newer, "sha256": sum_of(newer)}))
    answer = quantkit("verify", folder, env=offline)
    assert answer.code == NOT_CHECKED and "schema 3" in answer.err
    (folder / NAME).unlink()
    answer = quantkit("verify", folder, env=offline)
    assert answer.code == NOT_CHECKED and "has no receipt.json" in answer.err


def test_figures_of_the_report_follow_from_the_receipt(folder: Path) -> None:
    """Changed by somebody who makes all sums again."""
    report = folder / "report.json"
    kept = report.read_bytes(), (folder / NAME).read_bytes(), (folder / "README.md").read_bytes()
    edits: list[Callable[[Any], None]] = [
        lambda r: r["outputs"][0]["kl"].update(mean=r["outputs"][0]["kl"]["mean"] * 0.9),
        lambda r: r["outputs"][0]["kl"].update(ci95=[0.0, 1.0]),
        lambda r: r["outputs"][0].update(top1=0.999),
        lambda r: r["outputs"][0]["perplexity"].update(value=3.0),
        lambda r: r["outputs"][0]["weight_kl"].update(mean=0.0001),
        lambda r: r["outputs"][0]["domains"]["docs"]["kl"].update(mean=0.0001),
        lambda r: r["baselines"][0]["kl"].update(mean=9.0),
        lambda r: r["base"]["perplexity"].update(value=3.0),
        lambda r: r["outputs"][0].update(sha256="ab" * 32),
        lambda r: r["texts"].update(docs="ab" * 32),
        lambda r: r.update(model="another"),
    ]
    for edit in edits:
        change(report, edit)
        forge(folder, lambda _: None)
        assert "figures of report.json" in failed(look(folder))
        for path, data in zip((report, folder / NAME, folder / "README.md"), kept, strict=True):
            path.write_bytes(data)
    assert not failed(look(folder))


def test_figures_of_the_card_are_those_of_the_report(folder: Path, run: Run) -> None:
    card = folder / "README.md"
    text = card.read_text("utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| **`{GGUF}`**"))
    kl = row.split("|")[4].strip()
    sha = run.report["outputs"][0]["sha256"]
    value = next(line for line in text.splitlines() if line.strip().startswith("value: "))
    for old, new in (
        (row, row.replace(kl, "0.0001 ± 0.0000")),
        (sha, "ab" * 32),
        (read_json(folder / NAME)["sha256"], "cd" * 32),
        (value, value.partition(":")[0] + ": 0.0001"),
        (" % below", " % BELOW"),
    ):
        assert old in text and old != new
        card.write_text(text.replace(old, new), "utf-8")
        assert failed(look(folder)) == {"figures of README.md"}, old
    card.write_text(text + "\nA sentence of the owner's.\n", "utf-8")
    assert not failed(look(folder))
    card.unlink()
    assert states(look(folder))["figures of README.md"] is None


def test_forged_figures_fail_when_they_are_measured(run: Run, folder: Path) -> None:
    """Receipt, report and card agree with each other, and not with the file."""

    def better(value: Any) -> None:
        for windows in value["windows"]:
            if windows["kind"] == "ours" and windows["measure"] == "kl":
                windows["means"]["kl"] = [kl / 2 for kl in windows["means"]["kl"]]

    forge(folder, better)
    verdict = look(folder, base=run.base, n_windows=2, seed=1)
    assert verdict.status == NOT_VERIFIED and f"{GGUF}, KL" in failed(verdict)
    assert f"{GGUF}, weight KL" not in failed(verdict)
    (finding,) = (f for f in verdict.findings if f.name == f"{GGUF}, KL")
    assert finding.again == pytest.approx(2 * float(finding.claimed or 0), rel=1e-5)


def test_forged_answers_and_conversations_fail(run: Run, folder: Path) -> None:
    """Figures that were changed in the report, and those that were changed everywhere."""
    paths = folder / "report.json", folder / NAME, folder / "README.md"
    kept = {path: path.read_bytes() for path in paths}

    def put_back() -> None:
        for path, data in kept.items():
            path.write_bytes(data)

    report = folder / "report.json"
    edits: list[Callable[[Any], None]] = [
        lambda r: r["outputs"][0]["conversations"]["all"]["kl"].update(value=0.0001),
        lambda r: r["outputs"][0]["conversations"]["all"]["top1"].update(value=0.9999),
        lambda r: r["outputs"][0]["weight_conversations"]["all"].update(value=0.0001),
        lambda r: r["base"]["floor"]["all"]["kl"].update(value=0.5),
        lambda r: r["documents"].update(n_scored=1),
    ]
    for edit in edits:
        change(report, edit)
        forge(folder, lambda _: None)
        assert "figures of report.json" in failed(look(folder))
        put_back()
    for name in ("identical", "agreement", "length", "unfinished"):

        def better(r: Any, name: str = name) -> None:
            figure = r["outputs"][0]["answers"][name]
            figure.get("file", figure)["value"] = 0.123

        change(report, better)
        forge(folder, lambda _: None)
        assert "answers of report.json" in failed(look(folder)), name
        put_back()

    def closer(value: Any) -> None:
        for talks in value["talks"]:
            if talks["kind"] == "ours" and talks["measure"] == "kl":
                talks["kl"] = [kl / 3 for kl in talks["kl"]]

    forge(folder, closer)
    assert f"{GGUF}, KL in conversations" in failed(look(folder, base=run.base, n_windows=1))
    put_back()

    def copied(value: Any) -> None:
        """The original's answers as the file's: every figure of them would be perfect."""
        base = next(r for r in value["replies"] if r["kind"] == "base")
        for r in value["replies"]:
            if r["kind"] == "ours":
                r.update({key: base[key] for key in ("tokens", "ended", "texts", "agreed")})

    forge(folder, copied)
    found = failed(look(folder, base=run.base, n_windows=1))
    assert {f"{GGUF}, answers", "answers of report.json"} & found


def test_another_file_under_the_claims_fails(run: Run, folder: Path) -> None:
    """A worse file put in place of the measured one, with its sums."""
    data = np.fromfile(folder / GGUF, np.uint8)
    data[-40_000::97] ^= 1  # codes and scales of some tensors
    data.tofile(folder / GGUF)
    assert GGUF in failed(look(folder))
    forge(folder, lambda _: None)
    verdict = look(folder, base=run.base, n_windows=4)
    assert {f"{GGUF}, KL", f"{GGUF}, weight KL"} & failed(verdict)


def test_a_receipt_may_not_choose_what_passes(folder: Path) -> None:
    forge(folder, lambda value: value["tolerance"].update(kl=10.0))
    assert failed(look(folder)) == {"limits of the receipt"}


def test_other_tokens_fail(run: Run, folder: Path) -> None:
    forge(folder, lambda value: value["tokens"][0].update(sha256="ab" * 32))
    assert f"tokens of {GGUF}" in failed(look(folder, base=run.base, n_windows=1))


def test_texts_that_are_not_published_can_be_given(run: Run, folder: Path) -> None:
    """Their hash tells whether they are the ones."""

    def unpublished(value: Any) -> None:
        (text,) = (t for t in value["texts"] if t["name"] == "docs")
        del text["file"], text["license"]
        del value["files"]["texts/docs.txt"]

    kept = (folder / "texts/docs.txt").rename(folder.parent / "docs.txt")
    forge(folder, unpublished)
    verdict = look(folder, base=run.base, n_windows=2)
    assert verdict.status == NOT_CHECKED and states(verdict)["text docs"] is None
    assert states(verdict)[f"{GGUF}, KL"] is True  # on the other text
    given = look(folder, base=run.base, n_windows=2, texts={"docs": kept})
    assert given.status == VERIFIED
    kept.write_text("other")
    assert "text docs" in failed(look(folder, texts={"docs": kept}))


def test_files_that_it_does_not_know_are_told(folder: Path) -> None:
    shutil.copy(folder / GGUF, folder / "Other-Q4_K_M.gguf")
    assert states(look(folder))["Other-Q4_K_M.gguf"] is None


def test_a_file_that_is_a_pipe_blocks_nothing(folder: Path) -> None:
    import os

    (folder / "texts/docs.txt").unlink()
    os.mkfifo(folder / "texts/docs.txt")
    assert "texts/docs.txt" in failed(look(folder))
