"""The real `python -m quantkit` in a process of its own, and what it leaves in a run's folder.

Tests that need a finished run share one, and what differs from it only in later stages is forked
from it: a copy of its first stages with another config, which `resume` finishes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.config import RunConfig
from quantkit.files import sha256_file, write_json
from quantkit.gguf_file.read import GgufFile
from quantkit.run.artifacts import NAMES
from quantkit.run.events import Event, read_events
from quantkit.run.folder import RunDir, read_json
from quantkit.tensors import to_json

ROOT = Path(__file__).parents[2]
CHEAP = ("--profile", "demo", "--calibration", "docs,code")  # nothing is sampled from the model

_ABSENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "QUANTKIT_HF_TOKEN", "SYSTEM", "HF_ENDPOINT")


def environment(home: Path, **changes: str) -> dict[str, str]:
    """This process's environment without a token or cache of this machine, and without network."""
    kept = {k: v for k, v in os.environ.items() if k not in _ABSENT}
    return {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **changes}


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The object that `--json` prints as the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def quantkit(*arguments: str | Path, env: Mapping[str, str], root: Path = ROOT) -> Answer:
    """Run `python -m quantkit` of the sources in a folder to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *map(str, arguments)],
        cwd=root,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=900,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def quantkit_under(limit: str, *arguments: str | Path, env: Mapping[str, str]) -> Answer:
    """The same in a shell with a `ulimit`, such as "-n 12"."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit {limit} && exec "$0" -m quantkit "$@"', sys.executable]
        + list(map(str, arguments)),
        cwd=ROOT,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=900,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@contextmanager
def disk_of(folder: Path, options: str) -> Iterator[Path]:
    """A disk in memory on a new folder, with mount's options. Skips the test where it may not."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
    if made.returncode:
        pytest.skip("only root can mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def start(*arguments: str | Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m quantkit` as the leader of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "quantkit", *map(str, arguments)],
        cwd=ROOT,
        env=dict(env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[bytes], folder: Path, stage: str, kinds: str) -> bool:
    """Watch what is added to a run's events until the stage has had these kinds of them, such as
    "started progress". False when the process ended before.
    """
    path = RunDir(folder).events_path
    left = kinds.split()
    at = path.stat().st_size if path.exists() else 0
    while left:
        ended = process.poll() is not None
        events, at = read_events(path, at)
        for event in events:
            if left and (event.stage, event.kind) == (stage, left[0]):
                left.pop(0)
        if ended:
            break
        time.sleep(0.001)
    return not left


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Run:
    """A run's folder, read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dir = RunDir(folder)

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = read_json(self.dir.stage_dir("validate") / "report.json")
        return report

    @property
    def card(self) -> str:
        """The model card as it is published."""
        return (self.dir.artifacts.upload / "README.md").read_text("utf-8")

    @property
    def recipe(self) -> dict[str, Any]:
        recipe: dict[str, Any] = read_json(self.recipe_path)
        return recipe

    @property
    def recipe_path(self) -> Path:
        return next((self.dir.stage_dir("stitch") / "recipes").glob("*.json"))

    @property
    def budgets(self) -> list[dict[str, Any]]:
        budgets: list[dict[str, Any]] = read_json(self.dir.stage_dir("search") / "budgets.json")[
            "budgets"
        ]
        return budgets

    @property
    def base(self) -> Path:
        return self.dir.stage_dir("convert") / "base.gguf"

    @property
    def levels(self) -> Path:
        return self.dir.artifacts.levels

    @property
    def imatrix(self) -> Path:
        return self.dir.artifacts.imatrix

    @property
    def output(self) -> Path:
        (path,) = self.dir.stage_dir("stitch").glob("*.gguf")
        return path

    @property
    def events(self) -> list[Event]:
        return read_events(self.dir.events_path)[0]

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of the base, the level files and the output, by name."""
        files = [self.base, *sorted(self.levels.glob("*.gguf")), self.output]
        return {path.name: sha256_file(path) for path in files}

    def fork(self, folder: Path, stage: str, **changes: Any) -> Run:
        """A folder with this run's stages before `stage`, and its config changed: as if a run with
        that config had come so far. Fields of earlier stages must stay as they are.
        """
        done = NAMES[: NAMES.index(stage)]
        folder.mkdir()
        records = {name: record for name, record in self.dir.records().items() if name in done}
        for name in done:
            source = self.dir.stage_dir(name)
            shutil.copytree(source, folder / source.name)  # keeps modification times
        config = {**read_json(self.dir.config_path), **to_json(changes)}
        write_json(folder / "config.json", RunConfig.from_json(config))
        write_json(folder / "manifest.json", {"schema": 2, "stages": records})
        return Run(folder)


def packed_tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor of a GGUF."""
    file = GgufFile(path)
    return {
        name: (str(tensor.qtype), np.ascontiguousarray(file.packed(name)).tobytes())
        for name, tensor in file.tensors.items()
    }
