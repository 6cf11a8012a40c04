"""Times are of the machine that plans, not of the one that they were measured on."""

from __future__ import annotations

import os

import pytest

from quantkit.planning.here import here
from quantkit.planning.nouns import Seconds
from quantkit.planning.time import gpu_speed


@pytest.mark.parametrize(
    ("n_cores", "name", "seconds"),
    [(1, "1 core", 210), (2, "2 cores", 110), (16, "16 cores", 22.5)],
)
def test_work_is_shared_by_the_cores(
    monkeypatch: pytest.MonkeyPatch, n_cores: int, name: str, seconds: float
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    found = here("cpu")
    assert found.name == name
    assert Seconds(10, 100).on(found.speed) == seconds


def test_gpus_are_known_by_their_makers_names() -> None:
    assert gpu_speed("NVIDIA H200") == 1
    assert gpu_speed("NVIDIA A10") < gpu_speed("NVIDIA A100-SXM4-80GB") < 1
    assert gpu_speed("NVIDIA L4") < gpu_speed("1x Nvidia L40S")
    assert 1.7 < gpu_speed("NVIDIA H200", 2) < 1.9
    assert gpu_speed("NVIDIA GeForce RTX 4090") > gpu_speed("A GPU that nobody knows")
