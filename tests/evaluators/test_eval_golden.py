"""Numbers that do not move: of a tiny model computed in float64 numpy once, and of llama.cpp's own
`llama-perplexity` where it is installed.

The second part needs a real model:

    LLAMA_BIN=DIR LLAMA_BASE=BASE.gguf LLAMA_FILE=FILE.gguf LLAMA_TEXT=FILE \
    pytest -m slow tests/evaluators/test_eval_golden.py

DIR holds llama-perplexity (`benchmarks/llamacpp_peer.sh build`); LLAMA_CHUNKS (default 4) windows
of 512 are scored.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from eval_fixtures import ONE, TEXT, TinyFiles, tiny

from evaluators import kl, perplexity
from evaluators.base_logits import BaseLogits

__all__ = ["tiny"]  # a fixture: used by name

# 4 windows of `TEXT`; the numpy model of eval_fixtures in float64. llama.cpp computes this F32
# model with F16 keys and values, hence the tolerances.
PERPLEXITIES = {"llama.cpp": (64, 2395.8825), "gptq": (96, 2439.4888)}
MEAN_KL, MEDIAN_KL, TOP1 = 0.1136596, 0.1082695, 0.7177419


@pytest.mark.parametrize("protocol", list(PERPLEXITIES))
def test_perplexity(tiny: TinyFiles, protocol: str) -> None:
    n_ctx, golden = PERPLEXITIES[protocol]
    found = perplexity.measure(tiny.base, TEXT, n_ctx, 4, protocol, ONE)
    assert found.perplexity.value == pytest.approx(golden, rel=1e-4)


def test_divergence(tiny: TinyFiles) -> None:
    with BaseLogits.compute(tiny.base, {"text": TEXT}, 64, 4, runtime=ONE) as base:
        found = kl.measure(base, tiny.noisy, ONE).combined
    assert found.kl.mean == pytest.approx(MEAN_KL, rel=1e-3)
    assert found.kl.median == pytest.approx(MEDIAN_KL, rel=3e-3)
    assert found.top1 == pytest.approx(TOP1, abs=1e-6)


@pytest.mark.slow
def test_llama_perplexity_says_the_same(tmp_path: Path) -> None:
    names = ("LLAMA_BIN", "LLAMA_BASE", "LLAMA_FILE", "LLAMA_TEXT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        pytest.skip(f"set {', '.join(missing)}: see the module")
    folder, base, file, text = (Path(os.environ[name]) for name in names)
    n_chunks = int(os.environ.get("LLAMA_CHUNKS", "4"))
    stored = tmp_path / "base.kld"

    def theirs(*arguments: str) -> str:
        command = [str(folder / "llama-perplexity"), "-c", "512", "-t", "1", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    chunks = ("--chunks", str(n_chunks))
    told = theirs("-m", str(base), "-f", str(text), *chunks, "--kl-divergence-base", str(stored))
    ppl = float(re.findall(r"Final estimate: PPL = ([\d.]+)", told)[0])
    told = theirs("-m", str(file), "--kl-divergence-base", str(stored), "--kl-divergence")
    mean = float(re.findall(r"Mean\s+KLD:\s+([\d.]+)", told)[0])
    file_ppl = float(re.findall(r"Mean PPL\(Q\)\s*:\s+([\d.]+)", told)[0])

    content = text.read_text("utf-8").removesuffix("\n")  # llama-perplexity -f takes it off, too
    with BaseLogits.compute(base, {"text": content}, 512, n_chunks, runtime=ONE) as logits:
        ours = kl.measure(logits, file, ONE).combined
    assert ours.base_perplexity.value == pytest.approx(ppl, rel=2e-3)
    assert ours.perplexity.value == pytest.approx(file_ppl, rel=2e-3)
    assert ours.kl.mean == pytest.approx(mean, rel=2e-3, abs=5e-5)
