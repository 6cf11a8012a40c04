"""Perplexity against the numpy forward pass, both protocols, and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import ONE, SPEC, TEXT, TinyFiles, log_softmax, reference_logits, run_json, tiny

from evaluators import perplexity
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Model, Runtime
from evaluators.texts import read_text

measure = partial(perplexity.measure, runtime=ONE)

__all__ = ["run_json", "tiny"]  # fixtures: used by name


def reference_nll(ids: np.ndarray, n_ctx: int, first: int, bos: int | None) -> np.ndarray:
    """-log p of the scored tokens from the numpy model, [n_windows, n_scored]."""
    rows = []
    for start in range(0, len(ids) // n_ctx * n_ctx, n_ctx):
        window = ids[start : start + n_ctx].copy()
        if bos is not None:
            window[0] = bos
        logp = log_softmax(reference_logits(SPEC, window))
        rows.append(-logp[np.arange(first, n_ctx - 1), window[first + 1 :]])
    return np.array(rows)


@pytest.mark.parametrize(("protocol", "n_ctx"), [("llama.cpp", 64), ("gptq", 96)])
def test_perplexity_equals_an_independent_model(tiny: TinyFiles, protocol: str, n_ctx: int) -> None:
    with Model(tiny.base) as model:
        ids = model.tokenize(TEXT)[: 6 * n_ctx + 5]
    is_llama = protocol == "llama.cpp"
    nll = reference_nll(ids, n_ctx, n_ctx // 2 if is_llama else 0, 1 if is_llama else None)
    result = measure(tiny.base, TEXT, n_ctx, max_windows=6, protocol=protocol)
    assert result.n_windows == 6
    assert result.perplexity.n == nll.size == 6 * (n_ctx // 2 - 1 if is_llama else n_ctx - 1)
    assert result.nll.mean == pytest.approx(nll.mean(), rel=2e-4)
    assert result.perplexity.value == pytest.approx(np.exp(nll.mean()), rel=2e-3)
    stderr = nll.std() / np.sqrt(nll.size - 1)
    assert result.nll.stderr == pytest.approx(stderr, rel=1e-3)
    assert result.perplexity.stderr == pytest.approx(np.exp(nll.mean()) * stderr, rel=3e-3)
    assert np.abs(result.token_nll - nll).max() < 0.02


def test_bos_replaces_only_where_the_vocabulary_adds_it(tiny: TinyFiles) -> None:
    with_bos = measure(tiny.base, TEXT, 64, max_windows=3)
    without = measure(tiny.no_bos, TEXT, 64, max_windows=3)
    with Model(tiny.no_bos) as model:
        ids = model.tokenize(TEXT)[: 3 * 64]
    assert ids[0] != 1
    nll = reference_nll(ids, 64, 32, bos=None)
    assert without.nll.mean == pytest.approx(nll.mean(), rel=2e-4)
    assert abs(with_bos.nll.mean - without.nll.mean) > 1e-3


def test_gptq_windows_keep_their_tokens(tiny: TinyFiles) -> None:
    with Model(tiny.base) as model:
        ids = model.tokenize(TEXT)[: 2 * 50]
    nll = reference_nll(ids, 50, 0, bos=None)  # the text's own BOS is in the first window only
    result = measure(tiny.base, TEXT, 50, max_windows=2, protocol="gptq")
    assert np.abs(result.token_nll - nll).max() < 0.02


def test_all_full_windows_and_no_tail(tiny: TinyFiles) -> None:
    with Model(tiny.base) as model:
        n_tokens = len(model.tokenize(TEXT))
    result = measure(tiny.base, TEXT, 250)
    assert n_tokens % 250 != 0
    assert result.n_windows == n_tokens // 250
    shorter = measure(tiny.base, TEXT[:-3], 250)  # the tail loses three characters
    assert shorter.perplexity == result.perplexity


def test_threads_do_not_change_the_numbers(tiny: TinyFiles) -> None:
    one = measure(tiny.base, TEXT, 64, max_windows=3, runtime=Runtime(n_threads=1))
    two = measure(tiny.base, TEXT, 64, max_windows=3, runtime=Runtime(n_threads=2))
    assert one.nll.mean == pytest.approx(two.nll.mean, rel=1e-5)


def test_progress_counts_windows(tiny: TinyFiles) -> None:
    calls: list[tuple[int, int]] = []
    measure(tiny.base, TEXT, 64, max_windows=3, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_text_shorter_than_a_window(tiny: TinyFiles) -> None:
    with pytest.raises(
        EvaluationError, match=r"\d+ tokens, fewer than one window of 128"
    ) as caught:
        measure(tiny.base, "The cat sat on a mat.", 128)
    assert caught.value.remedy
    with pytest.raises(EvaluationError, match="0 tokens|1 tokens"):
        measure(tiny.base, "", 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_ctx": 2}, "nothing to score"),
        ({"n_ctx": 64, "max_windows": 0}, "nothing to score"),
        ({"n_ctx": 64, "protocol": "half"}, "no protocol"),
    ],
)
def test_settings_that_measure_nothing(
    tiny: TinyFiles, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure(tiny.base, TEXT, **settings)


def test_command_prints_one_json_object(
    tiny: TinyFiles, tmp_path: Path, run_json: Callable[..., dict[str, Any]]
) -> None:
    text = tmp_path / "crlf.txt"
    text.write_bytes(TEXT.replace("\n", "\r\n").encode())
    result = run_json(perplexity.main, tiny.base, "--text", text, "--ctx", 64, "--chunks", 4)
    in_process = measure(tiny.base, read_text(text), 64, max_windows=4)
    assert result["perplexity"]["value"] == pytest.approx(in_process.perplexity.value)
    assert set(result["perplexity"]) == {"value", "stderr", "ci95", "n"}
    assert result["protocol"] == "llama.cpp" and result["n_ctx"] == 64
    assert result["n_windows"] == 4
    assert result["n_bytes"] == tiny.base.stat().st_size
    assert result["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    unix = measure(tiny.base, TEXT, 64, max_windows=4)  # carriage returns were not swallowed
    assert result["perplexity"]["value"] != pytest.approx(unix.perplexity.value, rel=1e-3)


def test_gptq_windows_are_2048_by_default(
    tiny: TinyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    status = perplexity.main([str(tiny.base), "--text", str(text), "--protocol", "gptq"])
    assert status == 1  # this model was trained with 256
    assert "context of 2048" in capsys.readouterr().err


def test_failures_are_one_sentence_on_stderr(
    tiny: TinyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1") * 1000)
    for arguments, sentence in [
        ([str(tiny.base), "--text", str(latin)], "not UTF-8 (byte 3)"),
        ([str(tiny.base), "--text", str(tmp_path / "none.txt")], "cannot be read"),
        ([str(latin), "--text", str(latin)], "not UTF-8"),
    ]:
        assert perplexity.main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and sentence in err and len(err.splitlines()) == 1


def test_wrong_use_exits_with_2(tiny: TinyFiles, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], [str(tiny.base)], [str(tiny.base), "--text", "x", "--ctx", "0"]):
        with pytest.raises(SystemExit) as caught:
            perplexity.main(arguments)
        assert caught.value.code == 2
    assert capsys.readouterr().out == ""


def test_table_is_for_people(
    tiny: TinyFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--ctx", "64", "--chunks", "2", "--table", "--threads", "1"]
    assert perplexity.main([str(tiny.base), *options]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "base.gguf" in out and " ± " in out
    with pytest.raises(json.JSONDecodeError):
        json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "no_bos"])
def test_llama_perplexity_agrees(tiny: TinyFiles, tmp_path: Path, name: str) -> None:
    folder = os.environ.get("LLAMA_CPP_BIN")
    if not folder:
        pytest.skip("set LLAMA_CPP_BIN to a folder with llama-perplexity")
    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    file = getattr(tiny, name)
    peer = subprocess.run(
        [f"{folder}/llama-perplexity", "-m", file, "-f", text, "-c", "128", "--chunks", "20"],
        capture_output=True,
        text=True,
        check=True,
    )
    match = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", peer.stderr + peer.stdout)
    assert match
    result = measure(file, TEXT, 128, max_windows=20)
    assert result.perplexity.value == pytest.approx(float(match[1]), rel=1e-4)
    assert result.perplexity.stderr == pytest.approx(float(match[2]), rel=1e-3)
