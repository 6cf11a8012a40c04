"""The commands by which people run a file.

pytest tests/evidence/test_run_with.py
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from test_card import report_value

from quantkit.evidence import run_with
from quantkit.evidence.report import read
from quantkit.evidence.report.schema import FilePart, Output

NAME = "Some Model-Q4_K_M.gguf"
PARTS = tuple(FilePart(f"Some Model-Q4_K_M-0000{i}-of-00002.gguf", 5, "ab" * 32) for i in (1, 2))


@pytest.fixture
def output() -> Output:
    first = read(report_value()).outputs[0]
    return dataclasses.replace(first, name=NAME, label="Q4_K_M")


def test_a_file_on_a_disk() -> None:
    here = run_with.local(NAME, Path("/models/it's") / NAME)
    assert here["llama.cpp"] == """llama-server -m '/models/it'"'"'s/Some Model-Q4_K_M.gguf'"""
    modelfile, create, run = here["Ollama"].splitlines()
    assert shlex.split(modelfile)[1] == f"FROM /models/it's/{NAME}"
    assert create == "ollama create some-model-q4_k_m -f Modelfile"
    assert run == "ollama run some-model-q4_k_m"
    assert shlex.split(run_with.local(NAME, None)["Ollama"].splitlines()[0])[1] == f"FROM ./{NAME}"


def test_a_published_file(output: Output) -> None:
    assert run_with.published(output, "you/x-GGUF") == {
        "Ollama": "ollama run hf.co/you/x-GGUF:Q4_K_M",
        "LM Studio": "lms get https://huggingface.co/you/x-GGUF",
        "llama.cpp": "llama-server -hf you/x-GGUF:Q4_K_M",
    }


def test_ollama_joins_parts_first(output: Output) -> None:
    """It cannot load them; llama.cpp can."""
    away = run_with.published(dataclasses.replace(output, parts=PARTS), "you/x-GGUF")
    assert away["llama.cpp"] == "llama-server -hf you/x-GGUF:Q4_K_M"
    download, merge, *_, run = [shlex.split(line) for line in away["Ollama"].splitlines()]
    assert download[:3] == ["hf", "download", "you/x-GGUF"]
    assert merge == ["llama-gguf-split", "--merge", PARTS[0].name, NAME]
    assert run == ["ollama", "run", "some-model-q4_k_m"]


def test_nothing_leaves_its_quotes(output: Output) -> None:
    loaded = run_with.published(dataclasses.replace(output, label="x;rm"), "$(rm)/y")
    assert shlex.split(loaded["Ollama"]) == ["ollama", "run", "hf.co/$(rm)/y:x;rm"]
    assert "'$(rm)/y:x;rm'" in loaded["llama.cpp"]
