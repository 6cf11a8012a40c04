"""Every family that people ask for, from a tiny checkpoint to parity with llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import FAMILIES
from family_run import Row, run_all

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """All of them at once, two at a time."""
    return {row.family: row for row in run_all(list(FAMILIES), tmp_path_factory.mktemp("f"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, rows: dict[str, Row]) -> None:
    """Converted, mapped, quantized with Hessians, loaded, the same logits; and other logits where
    rows are exchanged.
    """
    assert rows[name].passed, rows[name]


def test_the_table_names_every_family() -> None:
    listed = re.findall(r"^\| ([^|]+?) +\|", TABLE.read_text("utf-8"), re.MULTILINE)
    assert [name for name in listed if name in FAMILIES] == list(FAMILIES), "python dev/families.py"
