"""The fork server: what its forks share and what they do not, and how it ends and is replaced.

Attacks and limits are tried in forks, too: test_sandbox.py, test_sandbox_ends.py.

pytest tests/sandbox/test_fork_server.py
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_sandbox_ends import gone

from evaluators import sandbox as kernel
from quantkit.llamacpp.converter.install import ensure_converter
from quantkit.sandbox import Child, Job, Limits, fork_client
from quantkit.sandbox.start import environment
from quantkit.server.previews import keeper

pytestmark = pytest.mark.skipif(
    not kernel.KNOWN_MACHINE, reason="the kernel's interfaces are those of Linux"
)

STRANGER = """
import os, sys, time
def modules():
    return sorted(sys.modules)
def seen():
    import torch
    threads = len(os.listdir("/proc/self/task"))
    return [dict(os.environ), os.getcwd(), torch.get_num_threads(), threads, time.process_time()]
def count(n, seconds=0.3):
    time.sleep(seconds)
    return n
def limit():
    import resource
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0]
"""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[fork_client._Client]:
    """A client of its own, with nothing to import unless a test says so."""
    found = fork_client._Client()
    monkeypatch.setattr(fork_client, "_client", found)
    monkeypatch.setattr(fork_client, "MODULES", ())
    yield found
    found.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """Call a function of STRANGER. Returns its value, and whether it ran in a fork."""
    (tmp_path / "stranger.py").write_text(STRANGER)

    def call(name: str, **arguments: Any) -> tuple[Any, bool]:
        job = Job(f"stranger:{name}", arguments, Limits(20, 60), path=[tmp_path], preload=True)
        with Child(job) as child:
            (*_, last) = [m for m in child.messages() if m]
        assert last.kind == "value", child.ended
        return last.content, child.ended.forked

    return call


def pid_of(client: fork_client._Client) -> int:
    assert client.server is not None and client.server._process is not None
    return client.server._process.pid


def test_what_a_fork_finds(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries, but not the gguf that a converter brings; its own environment; no other thread,
    and as many as it may start; no processor time of the import.
    """
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    modules, forked = run("modules")
    assert forked and {"torch", "transformers.modeling_utils"} <= set(modules)
    assert not [name for name in modules if name.partition(".")[0] in ("gguf", "conversion")]
    (found, here, n_most, n_threads, seconds), _ = run("seen")
    home = found["HOME"]
    assert {k: v for k, v in found.items() if k != "LC_CTYPE"} == environment(home)
    assert here == home and os.listdir(home) == []
    assert (n_most, n_threads) == (int(found["OMP_NUM_THREADS"]), 1)
    assert seconds < 2


def test_the_converter_brings_nothing_that_is_there_already(run: Callable[..., Any]) -> None:
    """Its modules come before the packages, which a module that was imported before would not."""
    tree = ensure_converter()
    brought = {
        path.stem if path.suffix == ".py" else path.name
        for folder in (tree, tree / "gguf-py")
        for path in folder.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert {"gguf", "conversion"} <= brought
    modules, forked = run("modules")
    assert forked and not brought & set(modules)


def test_many_at_once(client: fork_client._Client, run: Callable[..., Any]) -> None:
    """From several threads, through one server, and nothing is left of them."""
    with ThreadPoolExecutor(6) as pool:
        values = list(pool.map(lambda n: run("count", n=n), range(12)))
    assert values == [(n, True) for n in range(12)]
    server = pid_of(client)
    time.sleep(1.0)  # it looks twice a second
    assert not Path(f"/proc/{server}/task/{server}/children").read_text()
    assert len(os.listdir(f"/proc/{server}/fd")) == 4  # stdin to stderr, and the socket


def test_a_parent_with_many_files(client: fork_client._Client, run: Callable[..., Any]) -> None:
    """As a page has with its connections: numbers above the 1,024 that select(2) takes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        pytest.skip(f"this system allows {soft} open files")
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert run("count", n=1) == (1, True)
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_a_killed_one_is_replaced(
    client: fork_client._Client, run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for n in range(3):
        assert run("count", n=n) == (n, True)
        os.kill(pid_of(client), signal.SIGKILL)
    assert run("count", n=3) == (3, True)
    assert caplog.text.count("The fork server is replaced") == 3
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_a_job_goes_on_when_the_server_is_killed(
    client: fork_client._Client, run: Callable[..., Any]
) -> None:
    assert run("count", n=0) == (0, True)
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(run, "count", n=1, seconds=2)
        time.sleep(1)
        os.kill(pid_of(client), signal.SIGKILL)
        assert working.result() == (1, True)


def test_an_interrupted_job_gives_the_next_one_nothing(
    client: fork_client._Client, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between asking for a fork and being told of it."""
    assert run("count", n=1) == (1, True)

    def interrupted(self: fork_client._Server, seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fork_client._Server, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("count", n=2, seconds=30)
    began = time.monotonic()
    assert run("count", n=3) == (3, True)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('no such library')", "ImportError: no such library"),
        ("import os; os.abort()", "it has ended"),
        (
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "2 threads run in it",
        ),
    ],
)
def test_without_one_each_child_imports_by_itself(
    client: fork_client._Client,
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: str,
    reason: str,
) -> None:
    (tmp_path / "broken_library.py").write_text(code)
    path = (*fork_client.import_path(), str(tmp_path))
    monkeypatch.setattr(fork_client, "import_path", lambda: path)
    monkeypatch.setattr(fork_client, "MODULES", ("broken_library",))
    for n in range(2):
        assert run("count", n=n) == (n, False)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert reason in warning
    assert client.server is None


def test_it_ends_when_it_has_nothing_to_do(
    client: fork_client._Client,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And is started anew for the next job, as if nothing had been."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fork_client, "IDLE_SECONDS", 0.5)
    assert run("count", n=1) == (1, True)
    first, home = pid_of(client), client.server.home if client.server else ""
    assert gone(first)
    assert run("count", n=2) == (2, True)
    assert pid_of(client) != first and not Path(home).exists()
    assert "replaced" not in caplog.text


def test_a_limit_that_is_lowered_later_holds(
    client: fork_client._Client, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("limit") == (64 * 2**20, True)
    asked = resource.getrlimit
    lower = (2**20, 2**20)
    monkeypatch.setattr(
        resource, "getrlimit", lambda w: lower if w == resource.RLIMIT_FSIZE else asked(w)
    )
    first = pid_of(client)
    assert run("count", n=1) == (1, True)
    assert pid_of(client) != first  # the new one inherits the limits as they are now


FORKING = """
import os, sys
from quantkit.sandbox import Child, Job, fork_client
fork_client.MODULES = ()
def value(n):
    with Child(Job("stranger:count", {"n": n}, path=[sys.argv[1]], preload=True)) as child:
        (*_, last) = [m for m in child.messages() if m]
    assert child.ended.forked
    return last.content
assert value(1) == 1
first = fork_client._client.server._process.pid
pid = os.fork()
if pid == 0:
    same = value(2) == 2 and fork_client._client.server._process.pid != first
    fork_client._client.close()
    os._exit(0 if same else 1)
assert os.waitpid(pid, 0)[1] == 0
assert value(3) == 3 and fork_client._client.server._process.pid == first
print(first)
"""


def test_a_parent_that_forks(run: Callable[..., Any], tmp_path: Path) -> None:
    """Its fork gets a server of its own, and both servers end with whom they belong to."""
    command = [sys.executable, "-W", "error", "-c", FORKING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert gone(int(done.stdout))


def test_memory_that_forks_share_is_counted_once(
    client: fork_client._Client, run: Callable[..., Any]
) -> None:
    """Of a keeper, an init and a worker only the last, which may take more than it shares."""
    with ThreadPoolExecutor(1) as pool:
        run("count", n=0)
        working = pool.submit(run, "count", n=1, seconds=3)
        server, deadline = pid_of(client), time.monotonic() + 10
        while len(tree := keeper.descendants(server)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        counted = keeper.memory_holders(os.getpid())
        working.result()
    assert len(tree) == 3 and server in [process.pid for process in counted]
    assert [process for process in tree if process in counted] == [tree[-1]]
