"""Strangers' GGUFs: each is read and evaluated, or refused with a sentence; none ends the process.

The cases are those of `broken_ggufs`: a sample here, every one with `-m slow`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import broken_ggufs
import pytest
from tiny_gguf import Shape, write_llama

from evaluators import generation
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Model, Runtime
from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.llamacpp import place

# What ends llama.cpp's process, as far as it is known.
DEADLY = (
    "blk.0.ffn_down.weight type 16",
    "output_norm.weight type 26",
    "experts",
    "experts without tensors",
    "alignment 1",
    "llama.block_count 0",
    "llama.block_count 1000000",
    "llama.attention.layer_norm_rms_epsilon nan",
    "output_norm.weight type 8",
)
N_SAMPLED = 110


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("whole") / "whole.gguf", Shape(stored="Q8_0"))


@pytest.fixture(scope="module")
def broken(whole: Path) -> dict[str, bytes]:
    return broken_ggufs.cases(whole.read_bytes())


def tried(whole: Path, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """What became of these cases, or of all."""
    done = subprocess.run(
        [sys.executable, broken_ggufs.__file__, str(whole), str(folder)],
        input=json.dumps(names),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict[str, Any]]) -> None:
    ran = [row["case"] for row in rows if row["run"] == "ran"]
    assert "intact" in ran and len(ran) > len(rows) / 20
    for row in rows:
        assert row["read"].startswith(("read", "refused: ")), row
        assert row["run"].startswith(("ran", "refused: ")), row
    # What ends llama.cpp and is not some bits here and there is refused before.
    ended = [row for row in rows if "by signal" in row["run"] and row["read"] == "read"]
    assert not [row for row in ended if not row["case"].startswith("flipped")]


def test_a_sample(whole: Path, broken: dict[str, bytes], tmp_path: Path) -> None:
    others = [name for name in broken if name not in ("intact", *DEADLY)]
    sample = random.Random(0).sample(others, N_SAMPLED)
    rows = tried(whole, tmp_path, ["intact", *DEADLY, *sample])
    assert len(rows) == N_SAMPLED + len(DEADLY) + 1
    check(rows)


@pytest.mark.slow
def test_every_one(whole: Path, broken: dict[str, bytes], tmp_path: Path) -> None:
    rows = tried(whole, tmp_path, [])
    assert len(rows) == len(broken) > 487
    check(rows)


def test_one_that_ends_llama_cpp_in_the_sandbox(broken: dict[str, bytes], tmp_path: Path) -> None:
    """Its process dies there, and the sentence has llama.cpp's own words."""
    path = tmp_path / "evil.gguf"
    path.write_bytes(broken["experts without tensors"])
    with pytest.raises(EvaluationError, match="SIGABRT") as caught:
        Model(path, place.runtime(1))
    assert "evil.gguf" in caught.value.message and caught.value.remedy


TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a large range": "{{ range(10**9)|list }}",
    "a large text": "{{ 'a' * 10**10 }}",
    "a large text, made later": "{% set x = messages[0].content %}{{ x * 10**10 }}",
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a namespace": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an error of its own": "{{ raise_exception('\\u001b[2J' * 10000) }}",
    "no syntax": "{% for %}",
    "a large number": "{{ 10**(10**9) }}",
    "a format": "{{ '%999999999999d' % 1 }}",
    "a strange time": "{{ strftime_now('%Y' * 100000000) }}",
}


def with_template(template: str, whole: Path, path: Path) -> Path:
    source = broken_ggufs.text(template.encode())
    made = broken_ggufs.Whole(whole.read_bytes())
    path.write_bytes(made.with_keys((b"tokenizer.chat_template", 8, source)))
    return path


@pytest.mark.parametrize("runtime", [Runtime(1), place.runtime(1)], ids=["plain", "sandbox"])
def test_a_template_that_can_be_used(runtime: Runtime, whole: Path, tmp_path: Path) -> None:
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    path = with_template(turn, whole, tmp_path / "template.gguf")
    with Model(path, runtime) as model:
        assert model.chat_prompt([{"role": "user", "content": "Hello"}]) == "user: Hello"
    said = generation.answer(path, "Hello", 2, runtime)
    assert said["asked"] == "chat template" and "template" not in said


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cannot_be_used(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file answers plain text, and why is said."""
    monkeypatch.setattr("evaluators.llama_runtime._RENDER_SECONDS", 3.0)
    path = with_template(TEMPLATES[name], whole, tmp_path / "template.gguf")
    said = generation.answer(path, "Hello", 2, Runtime(1))
    assert "cannot be rendered" in said["template"] or "within 3 seconds" in said["template"]
    assert said["asked"] == "plain text" and "text" in said
    assert said["template"] and len(said["template"]) < 2100 and said["template"].isprintable()


def test_a_name_with_escape_codes(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "names.gguf"
    data = whole.read_bytes()
    name = b"blk.0.ffn_down.weight"
    path.write_bytes(data.replace(name, b"\x1b[2J\x1b]0;PWN\x07".ljust(len(name), b"x")))
    with pytest.raises(QuantkitError) as caught:
        wanted = GgufFile(path)
        check_sound(wanted)
        raise QuantkitError("it is read")  # which is fine: nothing is said of the name
    assert "\x1b" not in str(caught.value)
