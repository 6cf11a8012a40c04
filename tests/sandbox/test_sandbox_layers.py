"""The real converter with each strong layer left out, started or forked: the same bytes, whatever a
system gives.

pytest tests/sandbox/test_sandbox_layers.py
"""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import pytest
from tiny_models import tiny_llama

from quantkit.files import sha256_file
from quantkit.llamacpp.converter.convert import convert
from quantkit.sandbox import Child
from quantkit.sandbox.fork_client import Forked

LAYERS = [(), ("mounts",), ("namespaces",), ("landlock",), ("namespaces", "landlock", "seccomp")]


@pytest.mark.slow
def test_the_same_file_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path / "Tiny")
    start = Child._start
    found = []
    for without, preload in product(LAYERS, (False, True)):

        def less(child: Child, without: tuple[str, ...] = without, preload: bool = preload) -> None:
            child.job = dataclasses.replace(child.job, without=without, preload=preload)
            start(child)
            assert isinstance(child._process, Forked) == preload

        monkeypatch.setattr(Child, "_start", less)
        result = convert(model, tmp_path / "base.gguf")
        found.append(sha256_file(result.path))
        spoken = [text for text in result.warnings if not text.startswith("This system")]
        assert not spoken, without
    assert len(set(found)) == 1
