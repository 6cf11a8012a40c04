"""Several sizes in one run: what is shared, what is refused, and a kill in the middle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import Answer, Run, kill, quantkit, start, wait_for

from quantkit.evidence.report import read
from quantkit.files import sha256_file
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.run.folder import read_json

pytestmark = pytest.mark.slow

TARGETS = [
    {"kind": "like", "value": "Q6_K"},
    {"kind": "size", "value": "10kB"},
    {"kind": "like", "value": "Q4_K_M"},
    {"kind": "bpw", "value": "5.75"},
]


@pytest.fixture(scope="module")
def forked(whole_run: tuple[Run, Answer], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole_run[0].fork(tmp_path_factory.mktemp("family") / "run", "search", targets=TARGETS)


@pytest.fixture(scope="module")
def family(forked: Run, offline: dict[str, str]) -> Run:
    answer = quantkit("resume", forked.folder, env=offline)
    assert answer.code == 0, answer.err
    return forked


def outputs(run: Run) -> list[Path]:
    folder = run.dir.stage_dir("stitch")
    return [folder / o["file"] for o in read_json(folder / "outputs.json")["outputs"]]


def test_every_size_that_can_be_made_is_made(family: Run) -> None:
    report = family.report
    files = [GgufFile(path) for path in outputs(family)]
    sizes = [path.stat().st_size for path in outputs(family)]
    limits = [budget["limit_bytes"] for budget in family.budgets]
    assert len(files) == 3 and limits == sorted(limits)
    for n_bytes, limit, row in zip(sizes, limits, report["outputs"], strict=True):
        assert 0.98 * limit < n_bytes <= limit
        assert row["n_bytes"] == n_bytes and row["search"]["limit_bytes"] == limit
    (refused,) = report["refused"]
    assert refused["target"] == "10kB" and "below the smallest" in refused["refusal"]
    assert any("10kB" in e.message for e in family.events if e.kind == "note")


def test_larger_files_are_closer_to_the_base(family: Run) -> None:
    kl = [row["weight_kl"]["mean"] for row in family.report["outputs"]]
    assert kl == sorted(kl, reverse=True)


def test_every_opponent_is_tested_against_every_file(family: Run) -> None:
    names = {row["name"] for row in family.report["outputs"]}
    assert all(row["versus"].keys() == names for row in family.report["baselines"])
    assert len(read(family.report).outputs) == 3


def test_every_file_has_its_recipe(family: Run, offline: dict[str, str], tmp_path: Path) -> None:
    upload = family.dir.stage_dir("publish") / "upload"
    for path in outputs(family):
        recipe = upload / "recipes" / f"{path.stem}.json"
        options = ("--base", family.base, "--levels", family.levels, "--out", tmp_path / path.name)
        answer = quantkit("rebuild", recipe, *options, "--json", env=offline)
        assert answer.code == 0, answer.err
        assert answer.json["sha256"] == sha256_file(upload / path.name)


def test_types_for_other_programs(family: Run) -> None:
    """The lines name every searched tensor, each pattern that tensor alone, with its type."""
    for path in outputs(family):
        stem = path.parent / "recipes" / path.stem
        tensors = GgufFile(path).tensors
        lines = Path(f"{stem}.tensor-types.txt").read_text().splitlines()
        for line in lines:
            pattern, _, qtype = line.rpartition("=")
            (name,) = [n for n in tensors if re.search(pattern, n)]
            assert tensors[name].qtype == QuantType(qtype.upper())
        assert len(lines) == len(read_json(Path(f"{stem}.json"))["tensors"])


def test_the_card_offers_all_of_them(family: Run) -> None:
    card = (family.dir.stage_dir("publish") / "upload" / "README.md").read_text("utf-8")
    for path in outputs(family):
        assert card.count(path.name) >= 4, path.name
        assert f"sha256 of `{path.name}`:\n`{sha256_file(path)}`" in card


def test_killed_in_the_second_search(
    family: Run, whole_run: tuple[Run, Answer], offline: dict[str, str], tmp_path: Path
) -> None:
    run = whole_run[0].fork(tmp_path / "killed", "search", targets=TARGETS)
    process = start("resume", run.folder, env=offline)
    second = run.dir.stage_dir("search") / str(family.budgets[1]["limit_bytes"]) / "state.json"
    while not second.exists():
        assert process.poll() is None
        wait_for(process, run.folder, "search", "progress")
    kill(process)
    assert "search" not in run.dir.records()
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert [sha256_file(p) for p in outputs(run)] == [sha256_file(p) for p in outputs(family)]


def test_few_types_and_a_least_one(
    whole_run: tuple[Run, Answer], offline: dict[str, str], tmp_path: Path
) -> None:
    run = whole_run[0].fork(tmp_path / "run", "search", max_types=2)
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert len({row["qtype"] for row in run.recipe["tensors"].values()}) <= 2
    assert any(e.message.startswith("the types are") for e in run.events)

    least = (("attn_v", ">=Q6_K"),)
    run = whole_run[0].fork(tmp_path / "least", "quantize", types=least)
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    types = {n: QuantType(row["qtype"]) for n, row in run.recipe["tensors"].items()}
    assert all(not q < QuantType("Q6_K") for n, q in types.items() if "attn_v" in n)
