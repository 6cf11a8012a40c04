"""What is installed: the lock is of what pyproject.toml allows, and of all that it asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from quantkit.llamacpp.converter import install

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def locked(name: str) -> dict[str, Requirement]:
    """The pins of a requirements file, by name."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in found}


def check(asked: list[str], pins: dict[str, Requirement]) -> None:
    for one in map(Requirement, asked):
        pin = pins[canonicalize_name(one.name)]
        (spec,) = pin.specifier
        assert spec.operator == "==" and one.specifier.contains(spec.version), one
        assert one.extras == pin.extras, one


def test_the_lock_is_of_what_is_asked_for() -> None:
    pins = locked("requirements.txt")
    check(PROJECT["dependencies"], pins)
    assert all(len(pin.specifier) == 1 and not pin.url for pin in pins.values())
    assert "://" not in (ROOT / "requirements.txt").read_text("utf-8")
    for extra in ("dev", "tasks"):
        check(PROJECT["optional-dependencies"][extra], locked("requirements-dev.txt"))


def test_the_converter_is_of_the_runtime_that_is_installed() -> None:
    assert f"llama-cpp-python=={install.VERSION}" in PROJECT["dependencies"]
