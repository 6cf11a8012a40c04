"""Another stage is one file and its place among the others: a made-up tenth one, in a copy of the
program that was changed where ARCHITECTURE.md says and nowhere else, is run, resumed and cleaned.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import CHEAP, ROOT, Answer, Run, quantkit

from quantkit.files import sha256_file
from quantkit.run.artifacts import NAMES

pytestmark = pytest.mark.slow

STAGE = '''"""weigh: what every budget leaves to a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.files import write_json
from quantkit.gguf_file.base import load_base
from quantkit.run.outputs import load_budgets
from quantkit.run.stage import Run, Stage, StageResult


@dataclass(frozen=True)
class Weighed:
    """Bits per weight by budget."""

    bpw: dict[int, float]


class Weigh(Stage):
    """Weigh every budget."""

    name = "weigh"
    version = 1
    fields = ("seed",)

    def execute(self, run: Run) -> StageResult:
        n = load_base(run.dir).n_elements
        found = Weighed({b.limit_bytes: 8 * b.limit_bytes / n for b in load_budgets(run.dir)})
        run.events.progress(self.name, 1, 1, "weighed")
        return StageResult([write_json(run.artifacts.weighed, found)], found)

    def is_intermediate(self, path: str) -> bool:
        return True
'''
# File, what stands there, and what is put before it.
EDITS = (
    ("quantkit/stages/__init__.py", "\nSTAGES", "from quantkit.stages.weigh import Weigh\n"),
    ("quantkit/stages/__init__.py", "    Stitch(),", "    Weigh(),\n"),
    ("quantkit/run/artifacts.py", '    "stitch",', '    "weigh",\n'),
    (
        "quantkit/run/artifacts.py",
        "    # stitch, validate, publish",
        "    @property\n    def weighed(self) -> Path:\n"
        '        return self.folder("weigh") / "weighed.json"\n\n',
    ),
    ("quantkit/run/folder.py", "\n\ndef _record(", "\n_SCHEMA = 3"),
)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with another stage between tune and stitch."""
    root = tmp_path_factory.mktemp("changed")
    for package in ("quantkit", "evaluators"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("*.pyc"))
    (root / "quantkit" / "stages" / "weigh.py").write_text(STAGE, "utf-8")
    for file, place, new in EDITS:
        text = (root / file).read_text("utf-8")
        assert text.count(place) == 1, (file, place)
        (root / file).write_text(text.replace(place, new + place), "utf-8")
    return root


def test_architecture_says_what_is_touched() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| a stage | "))
    for file in {file for file, _, _ in EDITS}:
        assert file.removeprefix("quantkit/").removesuffix("/__init__.py") in row, file


def test_a_tenth_stage(
    changed: Path,
    tiny_checkpoint: Path,
    whole_run: tuple[Run, Answer],
    tmp_path: Path,
    offline: dict[str, str],
) -> None:
    env = {**offline, "PYTHONPATH": os.fspath(changed)}
    folder, names = tmp_path / "run", [*NAMES[:6], "weigh", *NAMES[6:]]
    command = ("run", tiny_checkpoint, "--out", folder, *CHEAP)
    plan = quantkit("plan", tiny_checkpoint, *CHEAP, "--json", env=env, root=changed)
    assert list(plan.json["estimates"]["memory"]) == names
    answer = quantkit(*command, "--json", env=env, root=changed)
    assert answer.code == 0, answer.err
    assert list(answer.json["stages"]) == names
    assert sorted(path.name for path in folder.glob("*-*")) == sorted(
        f"{i}-{name}" for i, name in enumerate(names, 1)
    )
    said = json.loads((folder / "7-weigh" / "weighed.json").read_text())
    assert said == answer.json["stages"]["weigh"] and list(said["bpw"].values())[0] > 2
    expected = whole_run[0]
    (output,) = (folder / "8-stitch").glob("*.gguf")
    assert sha256_file(output) == expected.hashes[output.name]
    status = quantkit("status", folder, "--json", env=env, root=changed)
    assert (status.json["state"], status.json["done"]) == ("done", names)

    # What the next stage reads is made again, and a cleaned file is not missed.
    (folder / "7-weigh" / "weighed.json").write_text("{}")
    assert quantkit(*command, env=env, root=changed).code == 0
    assert json.loads((folder / "7-weigh" / "weighed.json").read_text()) == said
    assert quantkit("clean", folder, env=env, root=changed).code == 0
    assert not (folder / "7-weigh" / "weighed.json").exists()
    assert quantkit(*command, env=env, root=changed).code == 0

    # Nine stages and ten do not go on in each other's folders.
    old = expected.fork(tmp_path / "old", "publish").folder
    for run, root in ((folder, ROOT), (old, changed)):
        refused = quantkit("resume", run, env={**env, "PYTHONPATH": os.fspath(root)}, root=root)
        assert refused.code == 1 and "another --out" in refused.err
