"""What a page for strangers has to have before it converts anything.

pytest tests/llamacpp/test_converter_floor.py
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluators import sandbox as kernel
from quantkit import sandbox
from quantkit.errors import QuantkitError
from quantkit.llamacpp.converter import floor
from quantkit.sandbox import api

PUBLIC = {"QUANTKIT_PUBLIC": "1"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def asked_anew() -> None:
    floor._lacking.cache_clear()


def test_a_private_page_is_not_asked() -> None:
    floor.check_floor({"HF_TOKEN": "hf_x"})


@pytest.mark.skipif(not kernel.KNOWN_MACHINE, reason="the kernel's interfaces are those of Linux")
def test_a_public_page_that_has_it_all() -> None:
    """And whose processes cannot be read from then on."""
    code = (
        "import ctypes\nfrom quantkit.llamacpp.converter.floor import check_floor\n"
        "check_floor({'SYSTEM': 'spaces'})\nprint(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "QUANTKIT_HF_TOKEN"])
def test_a_token_in_the_environment(name: str) -> None:
    with pytest.raises(QuantkitError, match=f"{name} is in the environment") as it:
        floor.check_floor({**PUBLIC, name: "hf_x"})
    assert "app.py" in it.value.remedy


def test_a_system_without_filter(monkeypatch: pytest.MonkeyPatch, not_dumpable: None) -> None:
    monkeypatch.setattr(api, "protection", sandbox.Protection)
    with pytest.raises(QuantkitError, match="does not filter system calls"):
        floor.check_floor(PUBLIC)


@pytest.fixture
def not_dumpable() -> Any:
    """The floor makes the process so: pytest goes on as it was."""
    yield
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)


@pytest.mark.skipif(not kernel.KNOWN_MACHINE, reason="the kernel's interfaces are those of Linux")
@pytest.mark.skipif(not os.access(ROOT / "quantkit", os.W_OK), reason="the code is not ours")
def test_a_system_that_keeps_no_files(monkeypatch: pytest.MonkeyPatch, not_dumpable: None) -> None:
    """With neither Landlock nor mounts the code of whoever installed it can be changed: tried."""

    def call(function: str, arguments: dict[str, Any], **_: Any) -> Any:
        # It may make an empty file there, if nothing but the rights of files keeps it from it.
        without = ("mounts", "namespaces", "landlock")
        limits = sandbox.Limits(10, 20, file_bytes=1)
        (value,) = api.listen(sandbox.Job(function, arguments, limits, without=without), "value")
        return value

    monkeypatch.setattr(api, "call", call)
    with pytest.raises(QuantkitError, match="could change the code of the page"):
        floor.check_floor(PUBLIC)
    assert not list(ROOT.glob("**/quantkit-probe-*"))
