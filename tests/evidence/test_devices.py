"""What validate measures on, and why."""

from __future__ import annotations

import pytest
from eval_fixtures import TinyFiles, tiny

from evaluators.devices import gpus
from quantkit.evidence import devices
from quantkit.gguf_file.read import GgufFile

GB = 10**9

__all__ = ["tiny"]  # a fixture: used by name


@pytest.mark.parametrize(
    ("n_bytes", "free", "expected"),
    [
        (16 * GB, [130 * GB], devices.ALL_LAYERS),
        (16 * GB, [16 * GB], devices.ALL_LAYERS),
        (16 * GB, [8 * GB], 16),
        (16 * GB, [4 * GB, 4 * GB], 16),
        (16 * GB, [4 * GB, -GB], 8),
        (16 * GB, [-GB], 0),
    ],
)
def test_layers_that_fit(n_bytes: int, free: list[int], expected: int) -> None:
    assert devices.gpu_layers(n_bytes, 32, free) == expected


def test_a_run_on_the_cpu_is_measured_there_for_no_reason(tiny: TinyFiles) -> None:
    found = devices.choose("cpu", GgufFile(tiny.base))
    assert (found.name, found.reason, found.is_gpu) == ("CPU", None, False)


@pytest.mark.skipif(bool(gpus()), reason="this llama-cpp-python finds a GPU")
def test_a_run_on_a_gpu_says_why_it_is_measured_on_the_cpu(tiny: TinyFiles) -> None:
    found = devices.choose("cuda", GgufFile(tiny.base))
    assert (found.name, found.is_gpu) == ("CPU", False)
    assert found.reason == "this llama-cpp-python finds no GPU"


@pytest.mark.skipif(not gpus(), reason="needs a llama-cpp-python that finds a GPU")
def test_a_run_on_a_gpu_is_measured_there(tiny: TinyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    base = GgufFile(tiny.base)
    found = devices.choose("cuda", base)
    assert found.is_gpu and found.name != "CPU" and found.reason is None
    assert not devices.choose("cpu", base).is_gpu
    monkeypatch.setenv("QUANTKIT_MEMORY", "1GiB")
    found = devices.choose("cuda", base)
    assert (found.name, found.is_gpu) == ("CPU", False)
    assert found.reason and "free" in found.reason
