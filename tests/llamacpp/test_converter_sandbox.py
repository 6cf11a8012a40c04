"""The converter's cage, with a stand-in for the converter: a checkout of two small files, chosen
through QUANTKIT_CONVERTER. What is tested is the cage and not the animal; each run takes a fraction
of a second.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sandbox_ends import gone, session

from quantkit.checkpoint.safetensors import write_shell_of
from quantkit.errors import QuantkitError
from quantkit.llamacpp.converter.convert import ConversionResult, convert
from quantkit.sandbox import Limits
from quantkit.sandbox.start import environment as environment_of

# Small enough to be hit at once, large enough for Python itself.
SMALL = Limits(cpu_seconds=20, wall_seconds=30, memory_bytes=2**31, file_bytes=2**20)


@pytest.fixture
def listener():
    """A socket that notices who connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        yield server


@pytest.fixture
def run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call it with Python source: it is run as the converter would be, `out` being the output."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_shell_of(model / "model.safetensors", {"w": ("F16", (4, 4))})
    tree = tmp_path / "checkout"
    (tree / "gguf-py" / "gguf").mkdir(parents=True)
    (tree / "gguf-py" / "gguf" / "__init__.py").write_text(
        "class GGUFWriter:\n    def write_tensors_to_file(self): pass\n"
    )
    monkeypatch.setenv("QUANTKIT_CONVERTER", str(tree))

    def run(source: str, limits: Limits = SMALL, **options) -> ConversionResult:
        find_out = "import sys\nout = sys.argv[sys.argv.index('--outfile') + 1]\n"
        (tree / "convert_hf_to_gguf.py").write_text(find_out + source)
        return convert(model, tmp_path / "base.gguf", limits=limits, **options)

    return run


def test_the_child_sees_no_token_and_no_foreign_gguf(run_code, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MY_API_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    result = run_code(
        "import gguf, json, os\n"
        "open(out, 'w').write(json.dumps([dict(os.environ), sys.path, gguf.__file__]))"
    )
    environment, path, gguf_file = json.loads(result.path.read_text())
    expected = set(environment_of("/home")) | {"LC_CTYPE"}  # Python may set the last
    assert set(environment) <= expected
    assert "secret" not in str(environment)
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert "/somewhere" not in path
    assert gguf_file.startswith(path[0])
    assert "not checked" in result.converter


def test_the_child_reaches_no_socket_and_no_program(run_code, listener: socket.socket):
    """Neither through Python nor, where the kernel filters, through the C library."""
    port = listener.getsockname()[1]
    result = run_code(f"""
import ctypes, json, os, socket, subprocess
def attempt(function, *arguments):
    try:
        return repr(function(*arguments))
    except Exception as error:
        return type(error).__name__
libc = ctypes.CDLL(None, use_errno=True)
open(out, "w").write(json.dumps([
    attempt(socket.create_connection, ("127.0.0.1", {port})),
    attempt(socket.getaddrinfo, "localhost", 80),
    attempt(subprocess.run, ["true"]),
    attempt(os.system, "true"),
    libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0),
]))
""")
    *denied, descriptor = json.loads(result.path.read_text())
    assert denied == ["PermissionError"] * 4
    assert (descriptor == -1) == ("kernel" in result.network)
    with pytest.raises(TimeoutError):
        listener.accept()


def test_files_are_bounded(run_code):
    with pytest.raises(QuantkitError, match="above its limit of 1,048,576 bytes") as it:
        run_code("open(out, 'wb').write(bytes(2**21))")
    assert it.value.remedy


@pytest.mark.parametrize(
    ("source", "limits", "sentence"),
    [
        ("while True: pass", {"cpu_seconds": 1}, "its 1 seconds of processor time"),
        ("x = bytearray(2**32)", {}, "more than its 2,147,483,648 bytes of memory"),
        ("import time; time.sleep(60)", {"wall_seconds": 1}, "stopped after 1 seconds"),
        ("import os; os.kill(os.getpid(), 9)", {}, "out of memory"),
        ("import os; os.abort()", {}, "crashed \\(SIGABRT\\)"),
        ("raise OSError(28, 'No space left on device')", {}, "The disk is full"),
        ("raise RuntimeError('the moon is full')", {}, "failed: RuntimeError the moon is full"),
        ("import logging; logging.error('Odd.'); sys.exit(1)", {}, "failed: ERROR:root:Odd"),
        ("pass", {}, "failed"),  # it ends well without a file
    ],
)
def test_each_way_to_fail_has_a_sentence(run_code, tmp_path, source, limits, sentence):
    with pytest.raises(QuantkitError, match=sentence):
        run_code(source, Limits(**{**SMALL.__dict__, **limits}))
    assert not list(tmp_path.glob("base.gguf*"))


HOSTILE = "from evaluators.sandbox import tell, _result\nimport os, sys, time\n"


@pytest.mark.parametrize(
    "source",
    [
        "tell(total='x', error=[1], message={'a': 'b' * 10**6}, ok=True, done=True)",
        "tell(error='SystemExit', message='gguf ' * 10**5); raise ValueError('Model ' * 10**5)",
        'os.write(_result, b\'{"kind": "error", "message": {"a": 1}}\\n\'); os._exit(1)',
        'os.write(_result, b\'{"kind": "value", "content": null}\\n\'); os._exit(1)',
        'os.write(_result, b\'{"kind": "exit", "content": "0", "message": ""}\\n\'); os.abort()',
        "tell(total=-5); time.sleep(0.5); tell(total=2**70); time.sleep(0.5); sys.exit(3)",
        "print('\\x1b[2J WARNING:hf-to-gguf:' + ' ' * 10**6); sys.exit('\\x1b[31m')",
        "os.rename(out, out + '2')",
        "os.unlink(out); os.symlink('/etc/passwd', out)",
        "os.unlink(out); os.mkfifo(out)",
    ],
)
def test_what_it_says_is_not_believed(run_code, tmp_path: Path, source: str):
    """Nothing of it is a traceback, takes long, or reaches a terminal."""
    started = time.monotonic()
    with pytest.raises(QuantkitError) as it:
        run_code(HOSTILE + source, progress=lambda done, total: None)
    assert str(it.value).isprintable() and len(str(it.value)) < 2000
    assert time.monotonic() - started < 20
    assert sorted(p.name for p in tmp_path.glob("base.gguf*")) == []


@pytest.mark.parametrize("tokens", ["5", "[]", "{}", "dict(wrong=[1])", "dict(wrong=0, apart=0)"])
def test_a_check_that_cannot_be_read_has_failed(run_code, tokens: str):
    source = (
        f"{HOSTILE}tell(tokens={tokens})\nopen(out, 'w').write('x')\n"
        'os.write(_result, b\'{"kind": "value", "content": 1}\\n\')\nos._exit(0)'
    )
    result = run_code(source)
    assert not result.tokens.check.passed


def test_warnings_are_plain(run_code):
    """What the converter says and is shown is on one line, cut, and has no control characters."""
    said = "WARNING:hf-to-gguf:\\x1b[2J" + "x" * 9000
    result = run_code(
        f"print({said!r}.encode().decode('unicode_escape')); open(out, 'w').write('x')"
    )
    assert result.warnings[0].isprintable() and len(result.warnings[0]) == 500


def test_a_cancel_kills_the_child(run_code, tmp_path: Path):
    """The progress callback is the place where a run notices that it was cancelled."""
    source = """
import gguf, time
open(out, "wb").write(bytes(100))
class Tensor: nbytes = 1000
writer = gguf.GGUFWriter()
writer.arch, writer.kv_data, writer.tensors = "llama", [{}], [{"w": Tensor()}]
Tensor.tensor = None
gguf.LazyNumpyTensor = type("Lazy", (), {})
writer.write_tensors_to_file()
time.sleep(60)
"""
    seen = []

    def cancel(done: int, total: int) -> None:
        seen.append((done, total, _children()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_code(source, progress=cancel)
    ((done, total, children),) = seen
    assert (done, total) == (100, 1000) and children
    assert not any(map(session, children))
    assert not list(tmp_path.glob("base.gguf*"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_the_child_dies_with_its_parent(run_code, tmp_path: Path):
    with pytest.raises(QuantkitError):
        run_code("import sys; sys.exit(1)")  # writes the stand-in
    script = tmp_path / "checkout" / "convert_hf_to_gguf.py"
    script.write_text("import time; time.sleep(60)")
    code = (
        "from pathlib import Path; from quantkit.llamacpp.converter.convert import convert; "
        f"convert(Path({str(tmp_path / 'model')!r}), Path({str(tmp_path / 'base.gguf')!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 120
        while not (found := _children(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert session(found[0])
    finally:
        parent.kill()
        parent.wait()
    assert gone(found[0])


def _children(pid: int | None = None) -> list[int]:
    """The sandbox's keepers that a process has, itself or through its fork server: each leads a
    session.
    """
    pid = pid or os.getpid()
    numbers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(n): Path(f"/proc/{n}/cmdline").read_bytes() for n in numbers}
    keepers = [n for n, command in commands.items() if b"evaluators/sandbox.py" in command]
    for n, command in commands.items():
        if b"sandbox/fork_server.py" in command:
            forked = Path(f"/proc/{n}/task/{n}/children").read_text().split()
            keepers += [int(k) for k in forked if session(int(k))]
    return keepers
