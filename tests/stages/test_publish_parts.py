"""What stitch says of parts is what publish writes, and goes on with after a kill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval_fixtures import TinySpec, write_tiny

from quantkit.errors import QuantkitError
from quantkit.files import sha256_file
from quantkit.run.artifacts import Artifacts
from quantkit.run.recipe import Published
from quantkit.stages import publish, stitch


def test_parts_are_those_that_the_recipe_names(tmp_path: Path) -> None:
    told: list[str] = []
    events = SimpleNamespace(
        emit=lambda stage, kind, message: told.append(message),
        progress=lambda *_: None,
    )
    run: Any = SimpleNamespace(
        config=SimpleNamespace(split_bytes=100_000), artifacts=Artifacts(tmp_path), events=events
    )
    path = write_tiny(tmp_path / "m-Q4_K_M.gguf", TinySpec())
    parts = stitch._parts(run, path)
    assert len(parts) > 3 and f"in {len(parts)} parts" in told[0]
    made = Published(path.name, path.stat().st_size, sha256_file(path), "Q4_K_M", parts)
    found = publish._files(run, path, made)
    assert [(p.name, sha256_file(p)) for p in found] == [(p.name, p.sha256) for p in parts]
    first, second, *_ = found
    second.write_bytes(b"cut short")
    before = first.stat().st_mtime_ns
    assert publish._files(run, path, made) == found and sha256_file(second) == parts[1].sha256
    assert first.stat().st_mtime_ns == before, "what is whole is not written again"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    found[-1].unlink()
    with pytest.raises(QuantkitError, match="bytes have changed"):
        publish._files(run, path, made)
    whole = Published(path.name, path.stat().st_size, sha256_file(path), "Q4_K_M")
    assert publish._files(run, path, whole) == [path]
