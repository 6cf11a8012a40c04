"""Programs that a model wrote: right ones pass, and hostile ones get nothing and reach nothing."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from evaluators import code_scores, sandbox
from evaluators.code_scores import CodeEval, pass_at, passes
from evaluators.errors import EvaluationError

needs_sandbox = pytest.mark.skipif(
    not sandbox.KNOWN_MACHINE, reason="the kernel's interfaces are those of Linux"
)
PROBLEM = 'def add(a, b):\n    """Return a + b."""\n'
TESTS = "def check(f):\n    assert f(2, 3) == 5\n    assert f(-1, 1) == 0\ncheck(add)"


@needs_sandbox
def test_pass_at_k_of_right_and_wrong_programs() -> None:
    right, wrong = f"{PROBLEM}    return a + b\n", f"{PROBLEM}    return a * b\n"
    found, passed = CodeEval().compute([TESTS, TESTS], [[right, wrong], [wrong, wrong]], k=[1, 2])
    assert passed == [[True, False], [False, False]]
    assert found == {"pass@1": 0.25, "pass@2": 0.5}


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    assert pass_at(1, 10, 3) == pytest.approx(0.3)
    # one minus the share of pairs of which neither passed
    assert pass_at(2, 4, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at(5, 5, 1) == 1.0


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "def broken(:\n",
        "raise KeyboardInterrupt",
        "import sys\nsys.exit(0)",  # before the tests
        "import os\nos._exit(0)",
        "import os\nos.kill(os.getpid(), 9)",
        "import ctypes\nctypes.string_at(0)",  # a segmentation fault
        "import os\nos.write(1, b'x' * 10**6)\nassert False",
        "from evaluators import errors",  # nothing of ours is there
        "import quantkit",
    ],
)
def test_what_does_not_end_well_does_not_pass(program: str) -> None:
    assert not passes(f"{program}\n")


@needs_sandbox
def test_common_modules_are_there() -> None:
    assert passes("import math, re, json, collections, heapq, itertools, hashlib, numpy\n")


HOSTILE = {
    "reads a file": "open({secret!r}).read()",
    "reads a file by the system call": (
        "import ctypes\nc = ctypes.CDLL(None)\n"
        "assert c.open({secret!r}.encode(), 0) >= 0 or c.openat(-100, {secret!r}.encode(), 0) >= 0"
    ),
    "lists a folder": "import os\nassert os.listdir({outside!r})",
    "writes a file": "open({outside!r} + '/written', 'w').write('x')",
    "writes to the home": "import pathlib\npathlib.Path({home!r}, 'written').write_text('x')",
    "deletes a file": "import os\nos.unlink({secret!r})",
    "renames a folder": "import os\nos.rename({outside!r}, {outside!r} + '-gone')",
    "links a file": "import os\nos.symlink({secret!r}, {outside!r} + '/link')",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "connects by the system call": ("import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0"),
    "starts a program": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "replaces itself": "import os\nos.execv('/bin/true', ['true'])",
    "forks": "import os\nos.fork()",
    "forks by the system call": "import ctypes\nassert ctypes.CDLL(None).fork() >= 0",
    "kills its parent": "import os, signal\nos.kill({parent}, signal.SIGTERM)",
    "reads its parent's environment": "open('/proc/{parent}/environ', 'rb').read()",
    "reads its parent's memory": "open('/proc/{parent}/mem', 'rb')",
    "takes all memory": "x = bytearray(4 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1",
    "takes memory bit by bit": "x = []\nwhile True: x.append(bytearray(b'1') * (1 << 20))",
    "fills its folder": (
        "import tempfile\nwith tempfile.NamedTemporaryFile() as f:\n"
        "    for _ in range(2000): f.write(b'x' * (1 << 20)); f.flush()"
    ),
    "starts many threads": (
        "import threading, time\n"
        "for _ in range(500): threading.Thread(target=time.sleep, args=(30,)).start()"
    ),
    "raises its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))"
    ),
    "computes forever": "while True: pass",
    "catches everything and goes on": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    ),
    "ignores signals": (
        "import signal\nfor n in range(1, 60):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass"
    ),
}


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_get_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_scores, "_CPU_SECONDS", 1)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = outside / "secret"
    secret.write_text("the user's own")
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {
            "secret": str(secret),
            "outside": str(outside),
            "home": str(Path.home()),
            "port": server.getsockname()[1],
            "parent": os.getpid(),
        }
        began = time.monotonic()
        assert not passes(HOSTILE[name].format(**places) + "\n")
        assert time.monotonic() - began < 30  # a second of processor time, on any machine
        server.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert secret.read_text() == "the user's own"
    assert not Path.home().joinpath("written").exists()


@needs_sandbox
def test_the_token_is_not_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert passes("import os\nassert 'hf_' not in str(os.environ)\n")


@needs_sandbox
def test_what_waits_is_ended_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_scores, "_WALL_SECONDS", 1)
    began = time.monotonic()
    assert not passes("import time\ntime.sleep(60)\n")
    assert time.monotonic() - began < 20


@needs_sandbox
def test_nothing_is_left_running_or_open() -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        passes("while True: break\n")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.parametrize("missing", [("seccomp",), ("landlock", "mounts")])
def test_without_a_sandbox_nothing_is_run(
    missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel offers less, the program is not begun, and a sentence says why."""
    original = sandbox.Told

    def without(*arguments: object, **options: object) -> sandbox.Told:
        return original(*arguments, **{**options, "without": list(missing)})  # type: ignore[arg-type]

    monkeypatch.setattr(sandbox, "Told", without)
    code_scores.check_sandbox.cache_clear()
    try:
        with pytest.raises(EvaluationError, match="no sandbox for code") as caught:
            passes("pass\n")
        assert "Linux" in caught.value.remedy
        assert not code_scores._passes("pass\n")
    finally:
        monkeypatch.undo()
        code_scores.check_sandbox.cache_clear()
