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


def test_a_file_on_a_disk(output: Output) -> None:
    here = run_with.local(output, Path("/models/it's") / NAME)
    assert here["llama.cpp"] == """llama-server -m '/models/it'"'"'s/Some Model-Q4_K_M.gguf'"""
    modelfile, create, run = here["Ollama"].splitlines()
    assert shlex.split(modelfile)[1] == f"FROM /models/it's/{NAME}"
    assert create == "ollama create some-model-q4_k_m -f Modelfile"
    assert run == "ollama run some-model-q4_k_m"
    away = run_with.local(output, None)
    assert shlex.split(away["Ollama"].splitlines()[0])[1] == f"FROM ./{NAME}"


def test_parts_on_a_disk(output: Output) -> None:
    """llama.cpp opens the others by the first; the other programs get them joined."""
    parts = dataclasses.replace(output, parts=PARTS)
    first = f"/models/{PARTS[0].name}"
    here = run_with.local(parts, Path(first))
    assert shlex.split(here["llama.cpp"]) == ["llama-server", "-m", first]
    merge, *_ = map(shlex.split, here["LM Studio"].splitlines())
    assert merge == ["llama-gguf-split", "--merge", first, NAME]
    assert shlex.split(here["LM Studio"].splitlines()[1]) == ["lms", "import", NAME]
    assert (
        f"FROM ./{NAME}" in here["Ollama"] and here["Ollama"].splitlines()[0] in here["LM Studio"]
    )


def test_a_published_file(output: Output) -> None:
    assert run_with.published(output, [output], "you/x-GGUF") == {
        "Ollama": "ollama run hf.co/you/x-GGUF:Q4_K_M",
        "LM Studio": "lms get https://huggingface.co/you/x-GGUF",
        "llama.cpp": "llama-server -hf you/x-GGUF:Q4_K_M",
    }


def test_one_of_several_published_files(output: Output) -> None:
    """LM Studio chooses by the machine where no label says which."""
    other = dataclasses.replace(output, name="Some Model-Q5_K_M.gguf", label="Q5_K_M")
    away = run_with.published(other, [output, other], "you/x-GGUF")
    assert away["LM Studio"] == "lms get https://huggingface.co/you/x-GGUF@Q5_K_M"
    assert away["llama.cpp"] == "llama-server -hf you/x-GGUF:Q5_K_M"


def test_two_files_of_one_label_are_asked_for_by_name(output: Output) -> None:
    """By the label all programs would take the same one."""
    both = [
        dataclasses.replace(output, name=name)
        for name in ("M-EVO-Q4_K_M.gguf", "M-EVO-4.62bpw-Q4_K_M.gguf")
    ]
    for one in both:
        away = run_with.published(one, both, "you/x-GGUF")
        assert away["llama.cpp"] == f"llama-server -hf you/x-GGUF -hff {one.name}"
        assert away["Ollama"] == f"ollama run hf.co/you/x-GGUF:{one.name}"
        assert away["LM Studio"].splitlines() == [
            f"hf download you/x-GGUF {one.name} --local-dir .",
            f"lms import {one.name}",
        ]
    long = dataclasses.replace(both[0], name=f"{'M' * 80}-Q4_K_M.gguf")  # no tag of Ollama's
    away = run_with.published(long, [*both, long], "you/x-GGUF")
    assert away["Ollama"].startswith("hf download") and "hf.co" not in away["Ollama"]


def test_a_label_is_looked_for_as_llama_cpp_does(output: Output) -> None:
    """Anywhere in a name: also in that of the model."""
    files = [
        dataclasses.replace(output, name=f"M-q8_0-tuned-EVO-{label}.gguf", label=label)
        for label in ("Q4_K_M", "Q8_0")
    ]
    small, large = (run_with.published(one, files, "you/x")["llama.cpp"] for one in files)
    assert small == "llama-server -hf you/x:Q4_K_M"
    assert large == f"llama-server -hf you/x -hff {files[1].name}"


def test_ollama_joins_parts_first(output: Output) -> None:
    """It cannot load them; llama.cpp can."""
    parts = dataclasses.replace(output, parts=PARTS)
    away = run_with.published(parts, [parts], "you/x-GGUF")
    assert away["llama.cpp"] == "llama-server -hf you/x-GGUF:Q4_K_M"
    download, merge, *_, run = [shlex.split(line) for line in away["Ollama"].splitlines()]
    assert download[:3] == ["hf", "download", "you/x-GGUF"]
    assert merge == ["llama-gguf-split", "--merge", PARTS[0].name, NAME]
    assert run == ["ollama", "run", "some-model-q4_k_m"]


def test_nothing_leaves_its_quotes(output: Output) -> None:
    evil = dataclasses.replace(output, name="M-x;rm.gguf", label="x;rm")
    loaded = run_with.published(evil, [evil], "$(rm)/y")
    assert shlex.split(loaded["llama.cpp"]) == ["llama-server", "-hf", "$(rm)/y:x;rm"]
    assert "'M-x;rm.gguf'" in loaded["Ollama"] and "'$(rm)/y'" in loaded["Ollama"]
    named = run_with.published(evil, [evil, evil], "$(rm)/y")["llama.cpp"]
    assert shlex.split(named) == ["llama-server", "-hf", "$(rm)/y", "-hff", "M-x;rm.gguf"]
