"""What a run is only measured on and beside: a stranger's file cannot end it, and may be changed or
left out when it is resumed.
"""

from __future__ import annotations

from pathlib import Path

import broken_ggufs
from commands import Answer, Run, quantkit

from quantkit.files import sha256_file


def broken(run: Run, path: Path, name: str) -> Path:
    path.write_bytes(broken_ggufs.cases(run.output.read_bytes(), n_flips=0)[name])
    return path


def test_an_evil_file_beside_ours(
    whole_run: tuple[Run, Answer], offline: dict[str, str], tmp_path: Path
) -> None:
    whole, _ = whole_run
    evil = broken(whole, tmp_path / "evil.gguf", "experts without tensors")
    cut = broken(whole, tmp_path / "cut.gguf", "cut at -1")
    files = (str(evil), str(cut))
    run = whole.fork(tmp_path / "run", "validate", compare=files)
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    reasons = {row["name"]: row["reason"] for row in run.report["not_measured"]}
    assert "8 experts" in reasons["evil.gguf"] and "whole GGUF" in reasons["cut.gguf"]

    before = sha256_file(run.output), run.dir.records()
    answer = quantkit("resume", run.folder, "--compare", "none", "--json", env=offline)
    assert answer.code == 0, answer.err
    assert not {"evil.gguf", "cut.gguf"} & {row["name"] for row in run.report["not_measured"]}
    after = run.dir.records()
    again = [stage for stage in after if after[stage] != before[1][stage]]
    assert again == ["validate", "publish"] and sha256_file(run.output) == before[0]

    text = tmp_path / "short.txt"
    text.write_text("The cat sat on the mat. " * 400)
    answer = quantkit("resume", run.folder, "--eval-text", text, env=offline)
    assert answer.code == 0, answer.err
    assert list(run.report["texts"]) == ["short"]
    answer = quantkit("resume", run.folder, "--tasks", "a.jsonl", "--tasks", "b", env=offline)
    assert answer.code == 2
