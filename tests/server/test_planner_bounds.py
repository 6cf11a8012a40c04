"""The planner's processes: bounded, shared by visitor, and gone with the server, killed or not.

pytest tests/server/test_planner_bounds.py
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import psutil
import pytest
from plans import PLAN

from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.errors import QuantkitError
from quantkit.files import sha256_file, write_json
from quantkit.llamacpp.converter.install import install_dir
from quantkit.planning.nouns import Plan
from quantkit.server.previews import keeper
from quantkit.server.previews.turns import Share, Turns
from quantkit.tensors import to_json

until = fixtures.patience(300.0)

estimates = importlib.import_module(
    "quantkit.server.previews.estimate"
)  # its name is also a function's

EATER = "import time\nkept = bytearray(400_000_000)\ntime.sleep(600)"
# Leaves the session of its parent, and its parent.
RUNAWAY = (
    "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]],"
    " start_new_session=True)\n"
)


def kept(
    code: str,
    *arguments: str,
    memory: int = 150_000_000,
    busy: float = 600,
    seconds: float = 600,
) -> dict:
    """How a program ended under the keeper."""
    limits = map(str, (memory, busy, seconds))
    packages = str(Path(psutil.__file__).parents[1])
    command = [sys.executable, "-I", "-S", keeper.__file__, packages, *limits]
    child = subprocess.Popen(
        [*command, sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        return json.loads(child.stdout.read().splitlines()[-1])


def running(mark: str) -> list[int]:
    """Processes that have a word among their arguments."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def test_memory_is_bounded() -> None:
    assert kept(EATER)["ended"] == "memory"
    assert kept("kept = bytearray(50_000_000)")["ended"] == 0


def test_memory_of_the_whole_tree_is_bounded() -> None:
    code = (
        "import subprocess, sys, time\n"
        "half = 'import time; kept = bytearray(90_000_000); time.sleep(600)'\n"
        "[subprocess.Popen([sys.executable, '-c', half]) for _ in range(3)]\n"
        "time.sleep(600)"
    )
    assert kept(code)["ended"] == "memory"


def test_time_is_bounded() -> None:
    assert kept("import time; time.sleep(600)", seconds=0.5)["ended"] == "time"
    assert kept("while True: pass", busy=0.5)["ended"] == "time"


def test_processor_time_of_the_whole_tree_is_bounded() -> None:
    code = (
        "import subprocess, sys\n"
        "burn = 'import time\\nwhile time.process_time() < .2: pass'\n"
        "while True: subprocess.run([sys.executable, '-c', burn])"
    )
    assert kept(code, busy=1)["ended"] == "time"


def test_who_waits_for_the_cores_is_not_cut_off() -> None:
    assert kept("import time; time.sleep(2)", busy=1)["ended"] == 0


def test_nothing_is_left_behind() -> None:
    mark = f"runaway-{os.getpid()}"
    assert kept(RUNAWAY, mark)["ended"] == 0
    until(lambda: not running(mark))


@pytest.mark.slow
def test_the_first_preview_of_the_demo_fits_a_public_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes the checkpoint, beside what the planner itself takes."""
    (tmp_path / install_dir().name).symlink_to(install_dir())
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    asked = write_json(tmp_path / "asked.json", RunConfig(DEMO_MODEL))
    code = "import sys\nfrom quantkit.server.previews.plan_child import main\nmain(sys.argv)"
    memory = estimates._PUBLIC.memory_bytes
    ended = kept(code, str(asked), memory=memory)
    assert ended["ended"] == 0 and ended["peak_bytes"] < 0.8 * memory
    (made,) = tmp_path.glob("demo-*")
    weights = sha256_file(made / "model.safetensors")
    assert weights == "73ff19fe049bb820ccd204534f9a261426367e552124e776a510d0cc17ae0ed1"


@contextmanager
def silent_hub() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that takes a question and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked: list[socket.socket] = []

        def listen() -> None:
            while True:
                try:
                    asked.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        for one in asked:
            one.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_preview_dies_with_its_server(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "from quantkit.config import RunConfig\n"
        "from quantkit.server.previews.estimate import estimate\n"
        "estimate(RunConfig('a/b'), None, True, 'me')"
    )
    with silent_hub() as (url, asked):
        env = {**os.environ, "HF_ENDPOINT": url, "TMPDIR": str(tmp_path)}
        env.pop("HF_HUB_OFFLINE", None)
        server = subprocess.Popen([sys.executable, "-c", code], env=env)
        until(lambda: bool(asked))
        theirs = keeper.descendants(server.pid)
        assert len(theirs) >= 2, "the keeper and the planner"
        server.send_signal(number)
        server.wait()
        until(lambda: not any(process.is_running() for process in theirs))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the planner is asked, with nobody there to answer."""
    found: list[str] = []

    def ask(config: RunConfig, *_: Any) -> Plan:
        found.append(config.model)
        raise estimates.CutOff("The preview took too much time.")

    monkeypatch.setattr(estimates, "_ask", ask)
    monkeypatch.setattr(estimates, "_known", {})
    return found


def test_what_was_cut_off_is_not_tried_again(asked: list[str]) -> None:
    for who in ("a", "b", "c"):
        with pytest.raises(QuantkitError, match="too much time"):
            estimates.estimate(RunConfig("evil/model"), None, True, who)
    assert asked == ["evil/model"]


@pytest.mark.parametrize(
    "told",
    [b"", b"7\n", b"[" * 9000 + b"\n", b"x" * 20_000_000, b'{"plan": []}\n', b'{"looked": 3}\n'],
)
def test_what_a_planner_says_is_not_trusted(told: bytes) -> None:
    code = f"import sys; sys.stdout.buffer.write({told[:1]!r} * {len(told)})"
    if len(told) < 20_000:
        code = f"import sys; sys.stdout.buffer.write({told!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with child, pytest.raises(QuantkitError, match="could not be made"):
        estimates._answer(child, lambda first: None)


def answered(plan: dict[str, Any]) -> Plan:
    """What the server makes of a planner that says this."""
    code = f"print({json.dumps({'plan': plan})!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with child:
        return estimates._answer(child, None)


def test_a_plan_arrives_as_it_was_made() -> None:
    assert answered(to_json(PLAN)) == PLAN
    assert answered({**to_json(PLAN), "newer": 1}) == PLAN, "what is unknown is left out"


@pytest.mark.parametrize(
    "wrong",
    [
        {"schema": 2},
        {"model": None},
        {"sizes": {"budgets": []}},
        {"stock": {"Q4_K_M": "1"}},
        {"context": {**to_json(PLAN.context), "buffers": [[1, 2, 3]]}},
        {"coverage": {"share": "all", "apart": {}}},
        {"fallbacks": ["blk.0"]},
        {"estimates": {**to_json(PLAN.estimates), "seconds": 1.5}},
    ],
)
def test_a_plan_of_another_shape_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match="could not be made"):
        answered({**to_json(PLAN), **wrong})


class Line:
    """Visitors in threads, who hold their place until they are told to go."""

    def __init__(self, share: Share) -> None:
        self.now = 0.0
        self.turns = Turns(dataclasses.replace(share, patience=600.0), lambda: self.now)
        self.at_work: list[str] = []
        self.refused: list[str] = []
        self._go: dict[str, threading.Event] = {}

    def comes(self, name: str) -> None:
        """`name` is the visitor and a number."""
        self._go[name] = threading.Event()
        before = (len(self.turns._line), len(self.at_work), len(self.refused))
        threading.Thread(target=self._visit, args=(name,), daemon=True).start()
        until(lambda: (len(self.turns._line), len(self.at_work), len(self.refused)) != before)
        until(lambda: all(w.state == "waiting" for w in self.turns._line))

    def _visit(self, name: str) -> None:
        try:
            with self.turns.turn(name[0]):
                self.at_work.append(name)
                self._go[name].wait(600)
        except QuantkitError:
            self.refused.append(name)
        else:
            self.at_work.remove(name)

    def goes(self, name: str, after: float) -> None:
        self.now += after
        n_waiting = len(self.turns._line)
        self._go[name].set()
        until(lambda: name not in self.at_work)
        if n_waiting:
            until(lambda: len(self.at_work) >= 1)


def test_a_visitor_has_one_place_and_a_few_in_the_line() -> None:
    line = Line(Share(places=2, waiting_each=2))
    for name in ("a1", "a2", "a3", "a4"):
        line.comes(name)
    assert line.at_work == ["a1"] and line.refused == ["a4"]
    line.comes("b1")
    assert line.at_work == ["a1", "b1"], "nobody waits for a visitor's second preview"


def test_who_had_least_comes_first() -> None:
    line = Line(Share(places=1, waiting_each=5))
    line.comes("a1")
    line.comes("a2")
    line.goes("a1", 60)
    until(lambda: line.at_work == ["a2"])
    line.comes("a3")
    line.comes("b1")
    line.goes("a2", 60)
    until(lambda: line.at_work == ["b1"])


def test_a_full_line_makes_room_for_who_had_less() -> None:
    line = Line(Share(places=1, waiting=2))
    line.comes("a1")
    line.goes("a1", 60)
    line.comes("b1")
    line.comes("a2")
    line.comes("c1")
    line.comes("d1")
    until(lambda: line.refused == ["a2"])
    line.comes("e1")
    assert line.refused == ["a2", "e1"], "among equals who came first stays"


def test_time_in_an_hour_is_bounded() -> None:
    line = Line(Share(places=1, seconds_each=100))
    line.comes("a1")
    line.goes("a1", 101)
    line.comes("a2")
    assert line.refused == ["a2"]
    line.now += 3700
    line.comes("a3")
    assert line.at_work == ["a3"]
