"""Times are of the machine that plans, not of the one that they were measured on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from quantkit.planning import here
from quantkit.planning.nouns import Seconds
from quantkit.planning.time import CPU_MULTIPLY_ADDS, gpu_speed


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Machines are looked at once."""
    here.here.cache_clear()
    yield
    here.here.cache_clear()


@pytest.mark.parametrize(
    ("n_cores", "products", "name", "seconds"),
    [
        (1, 1.0, "1 core", 210),  # of which each is as fast as those that times are of
        (2, 1.0, "2 cores", 110),
        (16, 9.0, "16 cores", 22.5),
        (2, 5.0, "2 cores", 110),  # products alone are faster
        (2, 0.5, "2 cores", 210),  # slower cores
        (2, 0.52, "2 cores", 210),  # about the same
    ],
)
def test_work_is_shared_by_the_cores(
    monkeypatch: pytest.MonkeyPatch, n_cores: int, products: float, name: str, seconds: float
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    monkeypatch.setattr(here, "multiply_adds", lambda: products * CPU_MULTIPLY_ADDS)
    found = here.here("cpu")
    assert found.name == name
    assert Seconds(10, 100).on(found.speed) == seconds


def test_this_machine_multiplies() -> None:
    assert 1e8 < here.multiply_adds() < 1e14


def test_gpus_are_known_by_their_makers_names() -> None:
    assert gpu_speed("NVIDIA H200") == 1
    assert gpu_speed("NVIDIA A10") < gpu_speed("NVIDIA A100-SXM4-80GB") < 1
    assert gpu_speed("NVIDIA L4") < gpu_speed("1x Nvidia L40S")
    assert 1.7 < gpu_speed("NVIDIA H200", 2) < 1.9
    assert gpu_speed("NVIDIA GeForce RTX 4090") > gpu_speed("A GPU that nobody knows")
