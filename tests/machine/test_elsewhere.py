"""Other systems than Linux, as far as Linux can show them: they have no /proc, no memfd and fewer
system calls.

pytest tests/machine/test_elsewhere.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import CHEAP, ROOT, Run, environment
from tiny_models import tiny_llama

from evaluators import sandbox
from quantkit.hub import upload
from quantkit.machine import memory, room
from quantkit.server.executors import process
from quantkit.server.previews import keeper

# PyTorch's own code for Linux asks for the processor, nothing of ours does but for its name.
_HIDDEN = """
processor=$(mktemp) && cat /proc/cpuinfo > "$processor"
mount -t tmpfs none /proc && mv "$processor" /proc/cpuinfo && exec "$@"
"""


def without_proc(*command: str | Path, home: Path) -> str:
    """Run a command of Python's where /proc has nothing but the processor; return its stdout."""
    hidden = ["unshare", "--map-root-user", "--mount", "bash", "-c", _HIDDEN, "bash"]
    try:
        subprocess.run([*hidden, "test", "!", "-e", "/proc/self"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not hide /proc here")
    done = subprocess.run(
        [*hidden, sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_plan_and_a_run(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny")
    plan = without_proc("-m", "quantkit", "plan", model, *CHEAP, home=tmp_path)
    assert "memory" in plan
    run = ("-m", "quantkit", "run", model, *CHEAP, "--out", tmp_path / "run")
    without_proc(*run, home=tmp_path)
    assert Run(tmp_path / "run").output.exists()


@pytest.mark.slow
def test_a_preview(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from quantkit.config import RunConfig\n"
        "from quantkit.server.previews.estimate import estimate\n"
        "print(estimate(RunConfig(sys.argv[1])).model.id)"
    )
    model = tiny_llama(tmp_path / "tiny")
    assert without_proc("-c", code, model, home=tmp_path) == "tiny\n"


@pytest.mark.slow
def test_what_only_linux_has_is_asked_for_there_alone(tmp_path: Path) -> None:
    """mypy knows what Python lacks on macOS. What is left stands behind checks that it does not
    follow: Landlock and the fork server.
    """
    command = [sys.executable, "-m", "mypy", "--platform", "darwin", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = {tuple(re.findall(r'^(.+?):|no attribute "(\w+)"', line)) for line in errors}
    assert {(first[0], last[1]) for first, last in found} == {
        ("evaluators/sandbox.py", "O_PATH"),
        ("quantkit/sandbox/fork_client.py", "pidfd_send_signal"),
        ("quantkit/sandbox/fork_server.py", "pidfd_open"),
    }


def test_memory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_MEMORY", raising=False)
    monkeypatch.setattr(room, "_PROC", tmp_path)
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert 1 << 20 < memory.free_memory() < 1 << 50
    assert room.free().own > 1 << 20 and room.kills() == {}


def test_a_process_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PROC", tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        mark = process.started_at(child.pid)
        assert mark and process.is_alive(child.pid, mark) and mark == process.started_at(child.pid)
        assert mark != process.started_at(os.getpid())
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.is_alive(child.pid, mark), "its exit status alone is left"
    assert process.started_at(child.pid) is None


def test_a_planner_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "LINUX", False)
    code = "kept = bytearray(100_000_000); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        assert child.stdout is not None and child.stdout.readline()
        (found,) = [x for x in keeper.memory_holders(os.getpid()) if x.pid == child.pid]
        assert keeper.memory_bytes(found) > 100_000_000
        child.kill()


def test_how_far_an_upload_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    assert upload._position(tmp_path / "file") == 0
    with (tmp_path / "file").open("rb", buffering=0) as file:
        file.read(70)
        assert upload._position(tmp_path / "file") == 70
    assert upload._position(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("why", "then"),
    [("wall", "time.sleep(600)"), ("bytes", "[write(n) for n in range(600)]"), (None, "")],
)
def test_the_sandbox_keeps_its_bounds(tmp_path: Path, why: str | None, then: str) -> None:
    """All of it but the kernel's interfaces of Linux: nothing of a worker that took too much is
    left.
    """
    source = Path(sandbox.__file__).read_text("utf-8")
    script, program, folder = tmp_path / "sandbox.py", tmp_path / "program.py", tmp_path / "written"
    script.write_text(source.replace("\nLINUX = ", "\nLINUX = False and "))
    folder.mkdir()
    program.write_text(
        "import os, sys, time\n"
        "def write(n):\n"
        f"    open(f'{folder}/{{n}}', 'wb').write(bytes(100_000)), time.sleep(0.05)\n"
        f"open('{tmp_path}/pid', 'w').write(str(os.getpid()))\n{then}"
    )
    (result, result_w), (verdict, verdict_w), (lifeline, held) = (os.pipe() for _ in range(3))
    seconds = 3 if why == "wall" else 60
    limits = (60, seconds, 1 << 30, 1 << 20, 8)
    job = sandbox.Told(
        "evaluators.sandbox:run_file",
        {"path": str(program)},
        *limits,
        path=list(sandbox.import_path()),
        readable=[],
        writable=[str(folder)],
        folders=[str(folder)],
        mapped_bytes=0,
        address_bytes=None,
        without=[],
        inherited=[],
        result=result_w,
        verdict=verdict_w,
        lifeline=lifeline,
    )
    given = (result_w, verdict_w, lifeline)
    with (tmp_path / "log").open("wb") as log:
        child = sandbox.start(job._asdict(), {}, given, log.fileno(), str(script))
    for descriptor in given:
        os.close(descriptor)
    child.wait(120)
    with open(verdict) as said, open(result) as answers:
        assert json.load(said)["why"] == why, (tmp_path / "log").read_text()
        said_first = json.loads(answers.readline())
    assert said_first["content"] == {"landlock": 0, "seccomp": False, "capabilities": False}
    os.close(held)
    number = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if process.started_at(number) is None:
            break
        time.sleep(0.1)
    assert process.started_at(number) is None
