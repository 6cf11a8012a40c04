"""How a sandboxed call ends: by itself, by a limit, with its parent; and what a hostile answer does
to the parent. Nothing is left of it in any case.

pytest tests/sandbox/test_sandbox_ends.py
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import QuantkitError
from quantkit.evidence.parity import Found
from quantkit.llamacpp.place import Sandboxed
from quantkit.sandbox import Child, Crashed, Job, Limits, call
from quantkit.sandbox.api import listen
from quantkit.sandbox.fork_client import Forked
from quantkit.sources.fit import Report

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

SMALL = {"cpu_seconds": 20, "wall_seconds": 30, "memory_bytes": 2**29, "file_bytes": 2**20}


def session(number: int) -> list[int]:
    """What still runs of a session; a zombie whose parent has not looked yet is dead."""
    alive = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == number and fields[0] not in "ZX":
            alive.append(int(name))
    return alive


def gone(number: int) -> bool:
    deadline = time.monotonic() + 10
    while session(number) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not session(number)


@pytest.fixture(params=["started", "forked"])
def inside(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call it with the body of a function: it runs inside, in a process that was started for it or
    that a fork server forked. Returns its value.
    """
    preload = request.param == "forked"
    code = tmp_path / "code"
    code.mkdir()
    (tmp_path / "out").mkdir()

    def run(body: str, **limits: Any) -> Any:
        text = "\n    ".join(["def go(out):", *body.strip().splitlines()])
        (code / "stranger.py").write_text(text + "\n")
        job = Job(
            "stranger:go",
            {"out": str(tmp_path / "out")},
            Limits(**{**SMALL, **limits}),
            writable=[tmp_path / "out"],
            path=[code],
            log=tmp_path / "log",
            preload=preload,
        )
        children = []
        start = Child._start

        def watched(self: Child) -> None:
            start(self)
            assert self._process is not None and isinstance(self._process, Forked) == preload
            children.append(self._process.pid)

        Child._start = watched  # type: ignore[method-assign]
        try:
            (value,) = listen(job, "value")
            return value
        finally:
            Child._start = start  # type: ignore[method-assign]
            assert not session(children[0])

    return run


def test_a_value_comes_back(inside: Callable[..., Any]) -> None:
    assert inside("return {'a': [1, 2.5, None, 'é']}") == {"a": [1, 2.5, None, "é"]}
    assert call("quantkit.sandbox.outcome:plain", {"text": "a\x1bb\n c"}) == "a b c"


def test_what_lay_in_the_folder_does_not_count(inside: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out" / "before").write_bytes(bytes(2**21))
    body = "import time\nopen(out + '/file', 'wb').write(bytes(1000))\ntime.sleep(0.2)\nreturn 1"
    assert inside(body) == 1


def test_temporary_files_are_its_own(tmp_path: Path) -> None:
    """Also where nothing may be written outside; torch and others look for the folder."""
    (tmp_path / "stranger.py").write_text(
        "import tempfile\nfrom pathlib import Path\ndef go():\n"
        "    with tempfile.NamedTemporaryFile() as file:\n"
        "        file.write(bytes(10**6)); file.flush()\n"
        "        return [Path(file.name).stat().st_size, file.name]\n"
    )
    job = Job("stranger:go", {}, path=[tmp_path])
    with Child(job) as child:
        (last,) = [m for m in child.messages() if m]
    if "mount" not in child.ended.protection.namespaces:
        pytest.skip("this system gives no mount namespace")
    n_bytes, name = last.content
    assert n_bytes == 10**6 and not Path(name).parent.exists()


def test_errors_keep_their_words(inside: Callable[..., Any]) -> None:
    raising = "from quantkit.errors import QuantkitError\nraise QuantkitError('So\\x1b[2J.', 'Do.')"
    with pytest.raises(QuantkitError) as it:
        inside(raising)
    assert (it.value.message, it.value.remedy) == ("So [2J.", "Do.")
    assert not isinstance(it.value, Crashed)


# A path below it is longer than a path can be: its files cannot be named from outside.
DEEP = """import os
os.chdir(out)
for _ in range({}): os.mkdir('d' * 250); os.chdir('d' * 250)
for i in range(40): open(str(i), 'wb').write(bytes(2**20))
import time
"""
FORGED = "import os\nfrom evaluators import sandbox\nos.write(sandbox._result, {})\n"


@pytest.mark.parametrize(
    ("body", "limits", "reason"),
    [
        ("raise ValueError('no\\x1bno')", {}, "failed with ValueError: no no"),
        ("import sys\nsys.exit('enough')", {}, "ended early: enough"),
        ("import os\nos._exit(0)", {}, "ended without an answer"),
        ("import os\nos.abort()", {}, "crashed .SIGABRT"),
        ("import ctypes\nctypes.string_at(0)", {}, "crashed .SIGSEGV"),
        ("import os\nos.kill(os.getpid(), 9)", {}, "was killed, most likely"),
        ("while True: pass", {"cpu_seconds": 1}, "used up its 1 seconds of processor"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            {"cpu_seconds": 1},
            "used up its 1 seconds of processor",
        ),
        (
            "import threading, hashlib\ndata = bytes(2**20)\n"
            "def burn():\n    while True: hashlib.sha256(data)\n"
            "for _ in range(3): threading.Thread(target=burn).start()\nburn()",
            {"cpu_seconds": 1},
            "used up its 1 seconds of processor",
        ),
        ("import time\ntime.sleep(60)", {"wall_seconds": 1}, "was stopped after 1 seconds"),
        ("bytearray(2**32)", {}, "needed more than its 536,870,912 bytes of memory"),
        (
            # A stack is no data to the kernel's own limit.
            "import mmap, time\ngrows_down = 0x100\n"
            "page = mmap.mmap(-1, 2**30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | grows_down)\n"
            "for i in range(0, 2**30, 4096): page[i] = 1\ntime.sleep(5)",
            {},
            "needed more than its 536,870,912 bytes of memory",
        ),
        (
            "import threading, time\n"
            "for _ in range(100): threading.Thread(target=time.sleep, args=(5,)).start()",
            {},
            "can't start new thread|started more than 64 threads",
        ),
        ("open(out + '/file', 'wb').write(bytes(2**21))", {}, "OSError|wrote more"),
        (
            "for i in range(40): open(f'{out}/{i}', 'wb').write(bytes(2**20))",
            {},
            "wrote more than its 1,048,576 bytes",
        ),
        (DEEP.format(20) + "time.sleep(5)", {}, "wrote more than its 1,048,576 bytes"),
        (DEEP.format(2000) + "time.sleep(5)", {}, "wrote more than its 1,048,576 bytes"),
        ("import os\nfor i in range(10**5): os.mkdir(f'{out}/{i}')", {}, "wrote more"),
        ("for i in range(10**5): open(f'{out}/{i}', 'w').close()", {}, "wrote more"),
        (
            # Of a thread whose process's first one has ended /proc says nothing at first sight.
            "import ctypes, mmap, os, threading, time\n"
            "def take():\n    time.sleep(0.2)\n"
            "    page = mmap.mmap(-1, 2**30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100)\n"
            "    for i in range(0, 2**30, 4096): page[i] = 1\n"
            "    time.sleep(5)\n"
            "threading.Thread(target=take).start()\n"
            "ctypes.CDLL(None).syscall({'x86_64': 60}.get(os.uname().machine, 93), 0)",
            {},
            "needed more than its 536,870,912 bytes of memory",
        ),
        (FORGED.format("b'['*10**5 + b'\\n'"), {}, "answered with more than can be read"),
        (FORGED.format("b'nonsense\\n'"), {}, "answered with more than can be read"),
        (FORGED.format("b'[1]\\n'"), {}, "answered with more than can be read"),
        ("return 'x' * 2**25", {}, "answered with more than can be read"),
        (
            "from evaluators.sandbox import tell\nwhile True: tell()",
            {},
            "answered with more",
        ),
        (FORGED.format('b\'{"kind": "value"}\\n\'') + "os.abort()", {}, "crashed .SIGABRT"),
    ],
)
def test_each_end_has_a_reason(
    inside: Callable[..., Any], tmp_path: Path, body: str, limits: dict[str, int], reason: str
) -> None:
    started = time.monotonic()
    with pytest.raises(Crashed, match=reason):
        inside(body, **limits)
    assert time.monotonic() - started < 20


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a plain user")
def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    """What its owner alone could hide from a keeper who is no administrator, is too much."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from evaluators import sandbox\n"
        "import tempfile; folder = tempfile.mkdtemp(); os.mkdir(folder + '/closed', 0o300)\n"
        "print(sandbox.bytes_below(folder)); os.rmdir(folder + '/closed')\n"
        "print(sandbox.bytes_below(folder), sandbox.bytes_below(folder + '/none'))\n"
        "os.rmdir(folder)"
    )
    root = Path(__file__).parents[2]
    script = root / "tests" / "support" / "plain_user.py"
    done = subprocess.run(
        [sys.executable, script, sys.executable, "-c", code, root],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": "/tmp"},
    )
    assert (done.returncode, done.stdout) == (0, "None\n0 0\n"), done.stderr


def test_memory_that_it_shares_counts(tmp_path: Path) -> None:
    """Also what it only writes to, and never has in sight."""
    (tmp_path / "out").mkdir()
    (tmp_path / "filling.py").write_text(
        "import os, time\ndef go(shared):\n"
        "    for _ in range(1024): os.write(shared, bytes(2**20))\n    time.sleep(5)\n"
    )
    shared = os.memfd_create("shared")
    limits = Limits(20, 30, 2**29, 2**31)
    job = Job(
        "filling:go",
        {"shared": shared},
        limits,
        writable=[tmp_path / "out"],
        path=[tmp_path],
        inherited=[shared],
    )
    try:
        with pytest.raises(Crashed, match="more than its 536,870,912 bytes of memory"):
            list(listen(job, "value"))
    finally:
        os.close(shared)


def test_a_flood_keeps_nobody_from_ending_it(tmp_path: Path) -> None:
    """The caller gets to look around while nothing but its log comes."""
    (tmp_path / "flooding.py").write_text(
        "import os\ndef go():\n    while True: os.write(1, bytes(2**16))\n"
    )
    process = Sandboxed(Job("flooding:go", {}, Limits(60, 60), path=[tmp_path]))
    time.sleep(0.5)
    started = time.monotonic()
    process.end()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("answer", "shape"),
    [
        ({"a": 1}, list[str]),
        ([1], list[str]),
        ("1", int),
        (True, int),
        (float("nan"), int),
        ({"model": "a"}, Report),
        ({"oracle": "a", "passed_over": [], "agreement": {}}, Found),
        ({"oracle": "a", "passed_over": [], "more": 1}, Found),
    ],
)
def test_an_answer_of_another_shape(tmp_path: Path, answer: Any, shape: Any) -> None:
    (tmp_path / "lying.py").write_text(f"nan = float('nan')\ndef go():\n    return {answer!r}\n")
    with pytest.raises(Crashed, match="answered with something that was not asked for"):
        list(listen(Job("lying:go", {}, path=[tmp_path]), "value", shape))


def test_nothing_outlives_a_normal_end(inside: Callable[..., Any]) -> None:
    """The fixture looks for what is left of its session."""
    body = """
import threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
return 1"""
    assert inside(body) == 1


def test_it_is_quiet_about_a_flood(inside: Callable[..., Any], tmp_path: Path) -> None:
    assert inside("for _ in range(20000): print('x' * 4000)\nreturn 1") == 1
    assert (tmp_path / "log").stat().st_size < 5 * 2**20


def test_what_it_leaves_is_not_followed(inside: Callable[..., Any], tmp_path: Path) -> None:
    """Its home is gone afterwards, or is the fork server's, where nothing was left."""
    body = """
import os, tempfile
with open(tempfile.gettempdir() + "/scratch", "wb") as file: file.write(bytes(1000))
return [os.environ["HOME"], os.getcwd()]"""
    home, here = inside(body)
    assert home == here and not list(Path(home).glob("*"))


SLEEPING = """
import sys
from quantkit import sandbox
from quantkit.sandbox import fork_client
preload = sys.argv[2] == "forked"
job = sandbox.Job("sleeping:go", {}, sandbox.Limits(60, 90), path=[sys.argv[1]], preload=preload)
with sandbox.Child(job) as child:
    for message in filter(None, child.messages()):
        server = fork_client._client.server
        print(child._process.pid, *([server._process.pid] if preload else []), flush=True)
        print(server.home if preload else child._home, flush=True)
"""


@pytest.mark.parametrize("whom", ["parent", "keeper"])
@pytest.mark.parametrize("kind", ["started", "forked"])
def test_it_ends_with_who_started_it(tmp_path: Path, kind: str, whom: str) -> None:
    """However that ends."""
    (tmp_path / "sleeping.py").write_text(
        "import time\nfrom evaluators.sandbox import tell\n"
        "def go():\n    tell(up=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPING, str(tmp_path), kind], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    number, *servers = map(int, parent.stdout.readline().split())
    assert all(map(session, servers)) and len(servers) == (kind == "forked")
    home = Path(parent.stdout.readline().strip())
    assert home.is_dir()
    assert len(session(number)) == 3  # keeper, init, worker
    os.kill(parent.pid if whom == "parent" else number, signal.SIGKILL)
    assert gone(number)
    parent.kill()
    parent.wait()
    assert all(map(gone, servers))
    assert whom == "keeper" or not home.exists()


@pytest.mark.parametrize(
    ("which", "value"),
    [("RLIMIT_AS", 3 * 2**30), ("RLIMIT_CPU", 30), ("RLIMIT_FSIZE", 2**16), ("RLIMIT_NOFILE", 64)],
)
def test_limits_are_only_lowered(tmp_path: Path, which: str, value: int) -> None:
    """A caller under `ulimit` can call, and its lower limit holds inside."""
    (tmp_path / "asking.py").write_text(
        f"import resource\ndef go():\n    return resource.getrlimit(resource.{which})\n"
    )
    code = (
        "import json, sys\nfrom quantkit import sandbox\n"
        "limits = sandbox.Limits(3600, 90, 2**34, 2**30)\n"
        "job = sandbox.Job('asking:go', {}, limits, path=[sys.argv[1]])\n"
        "with sandbox.Child(job) as child:\n"
        "    (*_, last) = [m for m in child.messages() if m]\n"
        "print(json.dumps(last.content))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(getattr(resource, which), (value, value)),
    )
    assert done.returncode == 0, done.stderr
    soft, hard = json.loads(done.stdout)
    assert soft <= hard <= value
