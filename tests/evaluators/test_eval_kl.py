"""KL against the numpy model, the store of base logits, domains, weights and pairing."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
from eval_fixtures import (
    NOISY,
    ONE,
    SPEC,
    TEXT,
    TinyFiles,
    log_softmax,
    reference_logits,
    run_json,
    tiny,
    write_tiny,
)

from evaluators import base_logits, compare, kl
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Model
from evaluators.perplexity import measure as measure_perplexity
from evaluators.weights import expanded_to_f16
from evaluators.windows import cut_windows
from quantkit.llamacpp.place import runtime as sandboxed_runtime

compute = partial(base_logits.BaseLogits.compute, runtime=ONE, n_ctx=64)
measure = partial(kl.measure, runtime=ONE)

__all__ = ["run_json", "tiny"]  # fixtures: used by name


def quantized(source: Path, target: Path, ftype: int) -> Path:
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 1
    assert lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), params) == 0
    return target


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    paths = {"cats": tmp_path / "cats.txt", "digits": tmp_path / "digits.txt"}
    paths["cats"].write_text(TEXT)
    paths["digits"].write_text("".join(f"{i * i} {i * 91 % 1013}\n" for i in range(300)))
    return paths


def test_kl_equals_two_independent_models(tiny: TinyFiles) -> None:
    n_ctx, n_windows = 64, 5
    with compute(tiny.base, {"cats": TEXT}, max_windows=n_windows) as base:
        result = measure(base, tiny.noisy)
    with Model(tiny.base, ONE) as model:
        windows = cut_windows(model, TEXT, "llama.cpp", n_ctx, n_windows)
    divergence, same, nll, base_nll = [], [], [], []
    rows = np.arange(n_ctx // 2, n_ctx - 1)
    for window in windows.tokens:
        p = log_softmax(reference_logits(SPEC, window))[rows]
        q = log_softmax(reference_logits(NOISY, window))[rows]
        divergence.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        nll.append(-q[np.arange(len(rows)), window[rows + 1]])
        base_nll.append(-p[np.arange(len(rows)), window[rows + 1]])
    combined, expected = result.combined, np.array(divergence)
    n = expected.size
    assert combined.kl.n == n == n_windows * 31
    assert combined.kl.mean == pytest.approx(expected.mean(), rel=2e-3)
    assert combined.kl.stderr == pytest.approx(expected.std() / np.sqrt(n - 1), rel=5e-3)
    assert combined.kl.median == pytest.approx(np.median(expected), rel=0.02)
    assert combined.kl.p99 == pytest.approx(np.quantile(expected, 0.99), rel=0.01)
    assert combined.kl.max == pytest.approx(expected.max(), rel=0.01)
    top1 = np.array(same).mean()
    assert combined.top1 == pytest.approx(top1, abs=1.5 / n)
    assert combined.top1_stderr == pytest.approx(np.sqrt(top1 * (1 - top1) / (n - 1)), rel=0.02)
    assert combined.perplexity.value == pytest.approx(np.exp(np.mean(nll)), rel=2e-3)
    assert combined.base_perplexity.value == pytest.approx(np.exp(np.mean(base_nll)), rel=2e-3)
    change = np.array(nll) - np.array(base_nll)
    assert combined.ln_ppl_ratio.mean == pytest.approx(change.mean(), abs=2e-3)
    assert combined.ln_ppl_ratio.stderr == pytest.approx(change.std() / np.sqrt(n - 1), rel=0.01)
    assert 0.02 < combined.kl.mean < 1 and 0.2 < combined.top1 < 0.99


def test_a_file_has_no_divergence_from_itself(tiny: TinyFiles) -> None:
    with compute(tiny.base, {"cats": TEXT}, max_windows=4) as base:
        result = measure(base, tiny.base)
    assert abs(result.combined.kl.mean) < 1e-6
    assert result.combined.kl.max < 1e-5
    assert result.combined.top1 == 1.0
    assert result.combined.ln_ppl_ratio.mean == pytest.approx(0, abs=1e-6)


def test_perplexity_is_that_of_the_perplexity_evaluator(tiny: TinyFiles) -> None:
    with compute(tiny.base, {"cats": TEXT}, max_windows=3) as base:
        result = measure(base, tiny.noisy)
    alone = measure_perplexity(tiny.noisy, TEXT, 64, max_windows=3, runtime=ONE)
    assert result.combined.perplexity.value == pytest.approx(alone.perplexity.value, rel=1e-6)
    assert result.combined.perplexity.stderr == pytest.approx(alone.perplexity.stderr, rel=1e-6)


def test_domains_and_their_combination(tiny: TinyFiles, texts: dict[str, Path]) -> None:
    both = {name: path.read_text() for name, path in texts.items()}
    with compute(tiny.base, both, max_windows=3) as base:
        calls: list[tuple[int, int]] = []
        result = measure(base, tiny.noisy, progress=lambda *call: calls.append(call))
        with compute(tiny.base, {"digits": both["digits"]}, max_windows=3) as single:
            alone = measure(single, tiny.noisy)
    assert calls == [(i, 6) for i in range(1, 7)]
    assert list(result.domains) == ["cats", "digits"]
    assert result.domains["digits"] == alone.combined
    means = [domain.kl.mean for domain in result.domains.values()]
    assert result.combined.kl.mean == pytest.approx(np.mean(means))  # windows of equal size
    assert result.combined.kl.n == 2 * 3 * 31
    assert abs(means[0] - means[1]) > 1e-3


def test_cached_base_logits_are_reused_exactly(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_windows": 3, "cache_dir": tmp_path / "cache"}
    with compute(tiny.base, {"cats": TEXT}, **settings) as base:
        first = measure(base, tiny.noisy)
    [store] = (tmp_path / "cache").iterdir()
    n_rows = 3 * 31
    assert store.stat().st_size == 4096 + n_rows * (2 * SPEC.n_vocab + 20) + 4 * 3 * 64

    def refuse(*_: object) -> None:
        raise AssertionError("the base was loaded again")

    monkeypatch.setattr(base_logits, "Model", refuse)
    with compute(tiny.base, {"cats": TEXT}, **settings) as base:
        second = measure(base, tiny.noisy)
    assert second.combined == first.combined
    assert np.array_equal(second.tokens["cats"].kl, first.tokens["cats"].kl)


def test_other_settings_do_not_meet_a_cached_file(tiny: TinyFiles, tmp_path: Path) -> None:
    for text, n_ctx, base in [
        (TEXT, 64, tiny.base),
        (TEXT[5:], 64, tiny.base),
        (TEXT, 32, tiny.base),
        (TEXT, 64, tiny.noisy),
    ]:
        with compute(base, {"cats": text}, n_ctx=n_ctx, max_windows=2, cache_dir=tmp_path) as done:
            assert done.stores["cats"].windows.n_ctx == n_ctx
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_that_is_of_something_else_fails_closed(tiny: TinyFiles, tmp_path: Path) -> None:
    settings = {"max_windows": 2, "cache_dir": tmp_path}
    with compute(tiny.base, {"cats": TEXT}, **settings):
        pass
    [right] = tmp_path.iterdir()
    data = right.read_bytes()
    with compute(tiny.noisy, {"cats": TEXT}, **settings):
        pass
    [other] = [path for path in tmp_path.iterdir() if path != right]
    right.write_bytes(other.read_bytes())
    with pytest.raises(EvaluationError, match="to another base_sha256") as caught:
        compute(tiny.base, {"cats": TEXT}, **settings)
    assert "Delete it" in caught.value.remedy
    right.write_bytes(data[:-1])
    with pytest.raises(EvaluationError, match="incomplete"):
        compute(tiny.base, {"cats": TEXT}, **settings)
    right.write_bytes(b"x" * len(data))
    with pytest.raises(EvaluationError, match="does not hold base logits"):
        compute(tiny.base, {"cats": TEXT}, **settings)


def test_no_trace_is_left_without_a_cache(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with compute(tiny.base, {"cats": TEXT}, max_windows=1) as base:
        assert len(list(tmp_path.rglob("*.logits"))) == 1
        kl.measure_weights(base, tiny.noisy, runtime=ONE)
    with pytest.raises(EvaluationError):
        compute(tiny.base, {"cats": "The cat."})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_base_pass_leaves_no_store(tiny: TinyFiles, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(tiny.base, {"cats": TEXT}, cache_dir=tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_told_before_the_work(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: full)
    calls: list[int] = []
    with pytest.raises(EvaluationError, match="are\\s+free") as caught:
        compute(
            tiny.base,
            {"cats": TEXT},
            cache_dir=tmp_path,
            progress=lambda *call: calls.append(call[0]),
        )
    assert "--chunks" in caught.value.remedy and not calls


def test_files_of_another_vocabulary_are_refused(tiny: TinyFiles, tmp_path: Path) -> None:
    larger = write_tiny(tmp_path / "larger.gguf", replace(SPEC, n_vocab=352))
    with compute(tiny.base, {"cats": TEXT}, max_windows=1) as base:
        with pytest.raises(EvaluationError, match="352 tokens in its vocabulary, the base"):
            measure(base, larger)


def test_another_tokenization_is_said(tiny: TinyFiles) -> None:
    with compute(tiny.base, {"cats": TEXT}, max_windows=2) as base:
        assert measure(base, tiny.noisy).same_tokens
        other = measure(base, tiny.no_bos)
    assert not other.same_tokens
    assert abs(other.combined.kl.mean) < 1e-6  # the base's tokens were given to both


def test_pairing_tells_files_apart(tiny: TinyFiles, tmp_path: Path) -> None:
    worse = write_tiny(tmp_path / "worse.gguf", replace(SPEC, noise=0.2))
    with compute(tiny.base, {"cats": TEXT}, max_windows=12) as base:
        better_result, worse_result = measure(base, tiny.noisy), measure(base, worse)
        again = measure(base, tiny.noisy)
        with compute(tiny.base, {"cats": TEXT}, max_windows=5) as fewer:
            short = measure(fewer, tiny.noisy)
    test = kl.paired_test(worse_result, better_result)
    assert test.significant and test.ci95[0] > 0
    difference = worse_result.combined.kl.mean - better_result.combined.kl.mean
    assert test.difference == pytest.approx(difference)
    assert not kl.paired_test(again, better_result).significant
    with pytest.raises(EvaluationError, match="same windows"):
        kl.paired_test(short, better_result)


def test_weight_kl_leaves_the_rounding_of_activations_out(tiny: TinyFiles, tmp_path: Path) -> None:
    file = quantized(tiny.base, tmp_path / "q8.gguf", lib.LLAMA_FTYPE_MOSTLY_Q8_0)
    with compute(tiny.base, {"cats": TEXT}, max_windows=6) as base:
        as_it_runs = measure(base, file)
        weights = kl.measure_weights(base, file, runtime=ONE)
        for runtime in (ONE, sandboxed_runtime(n_threads=1)):
            in_memory = kl.measure_weights(base, file, Path("/nowhere"), runtime, memory=1 << 30)
            assert in_memory.combined == weights.combined
        with pytest.raises(OSError, match="nowhere"):  # too little memory: to the disk
            kl.measure_weights(base, file, Path("/nowhere"), ONE, memory=1 << 10)
    with expanded_to_f16(file, runtime=ONE) as expanded:
        assert expanded.stat().st_size > 1.5 * file.stat().st_size
    assert not expanded.exists()
    assert 0 < weights.combined.kl.mean < 0.7 * as_it_runs.combined.kl.mean


def test_command_for_one_and_for_several_files(
    tiny: TinyFiles,
    tmp_path: Path,
    texts: dict[str, Path],
    run_json: Callable[..., dict[str, Any]],
) -> None:
    settings = ["--text", texts["cats"], "--ctx", 64, "--chunks", 3]
    saved = tmp_path / "tokens.npz"
    one = run_json(kl.main, tiny.base, tiny.noisy, *settings, "--weight-kl", "--save", saved)
    fields = {"kl", "top1", "top1_stderr", "perplexity", "base_perplexity", "ln_ppl_ratio"}
    assert fields | {"n_windows", "domains", "weight_kl", "weight_top1"} <= set(one)
    assert set(one["kl"]) == {"mean", "stderr", "ci95", "median", "p99", "p999", "max", "n"}
    assert one["weight_kl"]["mean"] == pytest.approx(one["kl"]["mean"], rel=0.1)  # F32 weights
    with np.load(saved) as arrays:
        assert arrays["cats/kl"].shape == (3, 31)
        assert arrays["cats/kl"].mean() == pytest.approx(one["kl"]["mean"])
    several = run_json(kl.main, tiny.base, tiny.noisy, tiny.base, *settings)
    first, second = several["files"]
    assert first["kl"] == one["kl"]
    assert "versus_first" not in first
    assert second["versus_first"]["significant"] and second["versus_first"]["difference"] < 0


def test_command_names_domains(
    tiny: TinyFiles, texts: dict[str, Path], run_json: Callable[..., dict[str, Any]]
) -> None:
    settings = ["--text", f"prose={texts['cats']}", "--text", texts["digits"]]
    result = run_json(kl.main, tiny.base, tiny.noisy, *settings, "--ctx", 64, "--chunks", 2)
    assert list(result["domains"]) == ["prose", "digits"]
    assert result["n_windows"] == 4 and result["domains"]["prose"]["n_windows"] == 2


def test_command_refuses_two_texts_of_one_name(
    tiny: TinyFiles, texts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    twice = ["--text", str(texts["cats"]), "--text", str(texts["cats"])]
    assert kl.main([str(tiny.base), str(tiny.noisy), *twice]) == 1
    assert "Two texts have the name cats" in capsys.readouterr().err


def test_compare_puts_everything_into_one_object(
    tiny: TinyFiles, texts: dict[str, Path], run_json: Callable[..., dict[str, Any]]
) -> None:
    settings = ["--text", texts["cats"], "--ctx", 64, "--chunks", 4, "--task", "everyday"]
    settings += ["--limit", 6, "--speed", "--speed-ctx", 64, "--prompt", 16, "--generate", 4]
    files = [tiny.noisy, tiny.base]
    result = run_json(compare.main, "--base", tiny.base, *files, *settings, "--repeats", 1)
    assert result["settings"]["n_windows"] == 4
    first, second = result["files"]
    assert second["kl"]["mean"] == pytest.approx(0, abs=1e-6) and second["top1"] == 1.0
    assert second["versus_first"]["significant"] and not second["nll_versus_first"].keys() - {
        "difference",
        "stderr",
        "ci95",
        "p_value",
        "n_windows",
        "significant",
    }
    assert first["tasks"]["everyday"]["acc"]["n"] == 6
    assert second["tasks"]["everyday"]["flips"]["acc"]["n"] == 0
    assert result["base"]["tasks"]["everyday"]["acc"] == second["tasks"]["everyday"]["acc"]
    assert result["base"]["speed"]["generation"]["tokens_per_second"] > 0
    perplexity = measure_perplexity(tiny.base, TEXT, 64, max_windows=4, runtime=ONE).perplexity
    assert result["base"]["perplexity"]["value"] == pytest.approx(perplexity.value, rel=1e-6)


def test_compare_table(
    tiny: TinyFiles, texts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--text", str(texts["cats"]), "--ctx", "64", "--chunks", "3", "--threads", "1"]
    files = [str(tiny.noisy), str(tiny.base)]
    assert compare.main(["--base", str(tiny.base), *files, *settings, "--table"]) == 0
    out, err = capsys.readouterr()
    assert "noisy.gguf" in out and "(differs)" in out and "KL" in out
    assert "windows 3/3" in err and "\r" not in err  # not a terminal


@pytest.mark.slow
def test_llama_perplexity_agrees(tiny: TinyFiles, tmp_path: Path) -> None:
    folder = os.environ.get("LLAMA_CPP_BIN")
    if not folder:
        pytest.skip("set LLAMA_CPP_BIN to a folder with llama-perplexity")
    text, stored = tmp_path / "t.txt", tmp_path / "base.kld"
    text.write_text(TEXT)
    peer = [f"{folder}/llama-perplexity", "-c", "128", "--kl-divergence-base", stored]
    subprocess.run(
        [*peer, "-m", tiny.base, "-f", text, "--chunks", "20"], capture_output=True, check=True
    )
    answer = subprocess.run(
        [*peer, "-m", tiny.noisy, "--kl-divergence"], capture_output=True, text=True, check=True
    )
    output = answer.stdout + answer.stderr

    def value(pattern: str) -> float:
        match = re.search(pattern + r"\s*:\s*([\d.]+)", output)
        assert match, pattern
        return float(match[1])

    with compute(tiny.base, {"cats": TEXT}, n_ctx=128, max_windows=20) as base:
        ours = measure(base, tiny.noisy).combined
    assert ours.kl.mean == pytest.approx(value("Mean    KLD"), rel=2e-3, abs=5e-5)
    assert ours.kl.median == pytest.approx(value("Median  KLD"), rel=5e-3)
    assert ours.kl.p999 == pytest.approx(value(r"99\.9%   KLD"), rel=5e-3)
    assert 100 * ours.top1 == pytest.approx(value("Same top p"), abs=0.1)
    assert ours.perplexity.value == pytest.approx(value(r"Mean PPL\(Q\)"), rel=2e-3)


@pytest.mark.slow
def test_memory_with_a_vocabulary_of_150k(tmp_path: Path) -> None:
    spec = replace(SPEC, n_vocab=152_064, n_ctx_train=512)
    base = write_tiny(tmp_path / "base.gguf", spec)
    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    program = (
        "import sys\nfrom evaluators import kl, speed_probe\n"
        "status = kl.main(sys.argv[1:])\n"
        "print(speed_probe.peak_rss(), file=sys.stderr)\n"
        "sys.exit(status)"
    )
    arguments = [base, base, "--text", text, "--ctx", "512", "--chunks", "3"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(kl.__file__).parent.parent,
        check=True,
    )
    peak = int(done.stderr.split()[-1])
    assert 100e6 < peak - base.stat().st_size
    assert peak - base.stat().st_size < 1.5 * (1 << 30)


def test_quantize_parameters_keep_their_layout() -> None:
    assert ctypes.sizeof(lib.llama_model_quantize_params) == 64
    assert lib.llama_model_quantize_default_params().max_buf_size == 8 << 30


def test_fewer_windows_are_the_first_ones(tiny: TinyFiles, texts: dict[str, Path]) -> None:
    read = {name: path.read_text() for name, path in texts.items()}
    with compute(tiny.base, read) as base:
        whole, part = measure(base, tiny.noisy), measure(base, tiny.noisy, max_windows=2)
        with pytest.raises(EvaluationError, match="nothing to score"):
            measure(base, tiny.noisy, max_windows=0)
    for domain, scores in part.tokens.items():
        assert scores.kl.shape[0] == 2
        assert np.array_equal(scores.kl, whole.tokens[domain].kl[:2])
        assert np.array_equal(scores.base_nll, whole.tokens[domain].base_nll[:2])
    assert part.combined.n_windows == 2 * len(texts) < whole.combined.n_windows


def test_weights_are_tested_in_pairs(tiny: TinyFiles, tmp_path: Path) -> None:
    other = quantized(tiny.noisy, tmp_path / "q8.gguf", lib.LLAMA_FTYPE_MOSTLY_Q8_0)
    with compute(tiny.base, {"text": TEXT}) as base:
        rows, _ = kl.measure_files(base, [tiny.noisy, other], weights=True, runtime=ONE)
    assert "weight_versus_first" not in rows[0]
    difference = rows[1]["weight_kl"]["mean"] - rows[0]["weight_kl"]["mean"]
    assert rows[1]["weight_versus_first"]["difference"] == pytest.approx(difference, abs=1e-12)


def test_two_files_need_two_windows_before_the_work(tiny: TinyFiles) -> None:
    with compute(tiny.base, {"text": TEXT}, max_windows=1) as base:
        with pytest.raises(EvaluationError, match="at least two windows"):
            kl.measure_files(base, [tiny.noisy, tiny.base / "never opened"], runtime=ONE)
        rows, _ = kl.measure_files(base, [tiny.noisy], runtime=ONE)
    assert rows[0]["kl"]["ci95"] is None


def test_picked_windows_are_those_of_the_whole(tiny: TinyFiles, texts: dict[str, Path]) -> None:
    """The same figures window by window, by whatever windows stand beside them."""
    read = {name: path.read_text() for name, path in texts.items()}
    with compute(tiny.base, read) as base:
        whole = measure(base, tiny.noisy)
    n_windows = {name: len(scores.kl) for name, scores in whole.tokens.items()}
    picked = {"cats": (2, 0), "digits": (n_windows["digits"] - 1,)}
    with compute(tiny.base, read, picked=picked) as base:
        assert base.n_windows == 3
        some = measure(base, tiny.noisy)
    assert some.same_tokens
    for name, which in picked.items():
        found, wanted = some.tokens[name].by_window(), whole.tokens[name].by_window()
        for column in ("kl", "nll", "base_nll", "top1"):
            assert getattr(found, column) == tuple(getattr(wanted, column)[i] for i in which)
    assert whole.tokens["cats"].by_window().kl == pytest.approx(whole.tokens["cats"].kl.mean(1))
    with pytest.raises(EvaluationError, match="windows, not those"):
        compute(tiny.base, read, picked={**picked, "cats": (n_windows["cats"],)})
    with pytest.raises(ValueError, match="picked of every text"):
        compute(tiny.base, read, picked={"cats": (0,)})


def test_tokens_have_a_sum(tiny: TinyFiles) -> None:
    with Model(tiny.base, ONE) as model:
        windows = cut_windows(model, TEXT, n_ctx=64)
    ids = b"".join(int(i).to_bytes(4, "little") for row in windows.tokens for i in row)
    assert windows.sha256() == hashlib.sha256(ids).hexdigest()
    assert windows.picked([1]).sha256() != windows.picked([0]).sha256()
