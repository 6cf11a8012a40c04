"""`quantkit compare`: files of anybody, measured by the evaluators, as the same report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_fixtures import TEXT, TinyFiles, tiny
from hub_server import running_hub
from test_report import divergence, interval, perplexity

from quantkit.cli import main
from quantkit.errors import QuantkitError, UsageError
from quantkit.evidence import report
from quantkit.evidence.compare import Measured, to_report
from quantkit.evidence.report.schema import to_json
from quantkit.evidence.report.text import protocol_line
from quantkit.hub import given
from quantkit.sandbox.untrusted import build

__all__ = ["tiny"]  # a fixture: used by name


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "cats.txt"
    path.write_text(TEXT)
    return path


def test_two_files_become_a_report(
    tiny: TinyFiles, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    files = [str(tiny.noisy), str(tiny.base)]
    options = ["--base", str(tiny.base), "--text", f"cats={text}", "--ctx", "64", "--threads", "1"]
    assert main(["compare", *files, *options, "--weight-kl", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "is closest to the base" in shown and tiny.noisy.name in shown
    found = report.read(json.loads((out / "report.json").read_text("utf-8")))
    assert found.kind == "compare" and [row.kind for row in found.rows] == ["given", "given"]
    noisy, same = found.rows
    assert noisy.kl.value > 1e-3 > same.kl.value
    assert noisy.weight_kl is not None and found.tests(same).weight_kl is not None
    test = found.tests(same).kl
    assert test is not None and test.significant and test.difference < 0, "the base is better"
    assert "token_embd.weight" in (found.first.tensors or {})
    assert list(noisy.domains) == ["cats"]
    for name in ("report.md", "report.html", "plots/tensor-map.svg", "plots/frontier.png"):
        assert (out / name).stat().st_size > 0


def test_what_the_evaluators_refuse_is_passed_on(
    tiny: TinyFiles, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    out = tmp_path / "out"
    asked = ["compare", str(broken), "--base", str(tiny.base), "--text", str(text), "--ctx", "64"]
    assert main([*asked, "--out", str(out)]) == 1
    said = capfd.readouterr().err
    assert "broken.gguf is not a whole GGUF file" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "not a .gguf"),
        ("nowhere.gguf", "no file"),
        ("hf://owner/file.gguf", "does not name a file"),
        ("hf://owner/name/../../x.gguf", "does not name a file"),
        ("hf://own er/name/x.gguf", "not a model"),
    ],
)
def test_names_that_cannot_be(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        given.locate(name)


def test_the_command_line_checks_names_first(tmp_path: Path) -> None:
    assert main(["run", "demo:smollm2-135m", "--out", str(tmp_path), "--compare", "x.bin"]) == 2


def test_evaluator_json_without_options_is_enough(tiny: TinyFiles) -> None:
    """What kl's fields alone make: no weights, no speed, no tasks, no test."""
    row = {
        "file": str(tiny.noisy),
        "n_bytes": 1000,
        "kl": divergence(0.1, 0.01),
        "top1": 0.9,
        "top1_stderr": 0.01,
        "perplexity": perplexity(9.0),
        "ln_ppl_ratio": interval(0.1, 0.01),
    }
    domains = {"x": {k: row[k] for k in ("kl", "top1", "top1_stderr", "perplexity")}}
    domains["x"]["ln_ppl_ratio"] = row["ln_ppl_ratio"]
    settings = {"protocol": "llama.cpp", "n_ctx": 64, "n_windows": 1, "texts": {"x": "ab"}}
    measured = {
        "base": {"n_bytes": 2000, "perplexity": perplexity(9.0)},
        "files": [{**row, "domains": domains}],
        "settings": {**settings, "device": "CPU", "llama_cpp_python": "0"},
    }
    read = build(Measured, measured)
    made = to_report(read, tiny.base, [tiny.noisy], ["noisy.gguf"])
    assert report.read(to_json(made)) == made
    assert made.first.weight_kl is None
    assert made.first.zero_shot == {"status": "not run", "reason": "no --task"}
    assert "closest" in report.verdict(made)
    assert protocol_line(made).endswith(" Device: CPU.")


def test_figures_of_a_gpu_stand_beside_its_distance_from_the_cpu(tiny: TinyFiles) -> None:
    options = {"protocol": "llama.cpp", "n_ctx": 64, "n_windows": 1, "texts": {"x": "ab"}}
    figures = {
        "n_bytes": 1000,
        "kl": divergence(0.1, 0.01),
        "top1": 0.9,
        "top1_stderr": 0.01,
        "perplexity": perplexity(9.0),
        "ln_ppl_ratio": interval(0.1, 0.01),
    }
    apart = [divergence(mean, 1e-6) for mean in (0.00012, 0.00034)]
    base = {"n_bytes": 2000, "perplexity": perplexity(9.0), "device_kl": apart[0]}
    measured = {
        "base": base,
        "files": [{**figures, "domains": {}, "device_kl": apart[1]}],
        "settings": {**options, "device": "NVIDIA H200", "llama_cpp_python": "0"},
    }
    made = to_report(build(Measured, measured), tiny.base, [tiny.noisy], ["noisy.gguf"])
    assert report.read(to_json(made)) == made
    assert protocol_line(made).endswith(
        " Device: NVIDIA H200. Mean KL between the CPU and this device, of the same file:"
        " 0.000120 (full precision), 0.000340 (noisy.gguf)."
    )


def test_a_file_of_the_hub(
    tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tiny.noisy.read_bytes()
    with running_hub(monkeypatch, tmp_path) as server:
        server.add_model("alice/x", {"quants/x-Q4_K_M.gguf": data})
        server.fail_next("x-Q4_K_M.gguf", 503)
        found = given.locate("hf://alice/x/quants/x-Q4_K_M.gguf")
        assert found.read_bytes() == data
        n_requests = len(server.asked("/lfs/|resolve", "GET"))
        assert given.locate("hf://alice/x@main/quants/x-Q4_K_M.gguf") == found
        assert len(server.asked("/lfs/|resolve", "GET")) == n_requests, "it is in the cache"
        with pytest.raises(QuantkitError):
            given.locate("hf://alice/x/quants/nothing.gguf")
        with pytest.raises(QuantkitError):
            given.locate("hf://alice/nobody/x.gguf")
