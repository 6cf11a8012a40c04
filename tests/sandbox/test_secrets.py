"""Where a token can be read: in the memory of our own programs, and nowhere else.

pytest tests/sandbox/test_secrets.py
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.sandbox import secrets
from quantkit.server.executors import process
from quantkit.server.executors.hf_jobs import dispatch

TOKEN = "hf_abcdefghijklmnop"

# Tells what it knows and what the world can know of it.
SHOW = """
import ctypes, json, os, sys
from quantkit.sandbox import secrets
secrets.hide()
from quantkit.hub.client import resolve_token
with open("/proc/self/environ", "rb") as file:
    seen = file.read()
print(json.dumps({
    "token": resolve_token(), "seen": "hf_" in seen.decode(), "arguments": sys.argv[1:],
    "stdin": sys.stdin.read(), "variables": [n for n in os.environ if secrets.is_secret(n)],
    "left": secrets.DESCRIPTOR in os.environ, "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
    "secret": secrets.get("OAUTH_CLIENT_SECRET"),
}))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


def shown(env: dict[str, str], **options) -> dict:
    clean = {n: v for n, v in os.environ.items() if not secrets.is_secret(n)}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, "one", "two words"],
        env={**clean, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", **env},
        capture_output=True,
        text=True,
        input="asked",
        **options,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
def test_a_child_gets_its_secrets_on_stdin() -> None:
    """Where a library starts it and takes no descriptors; its own input is empty then."""
    clean = {n: v for n, v in os.environ.items() if not secrets.is_secret(n)}
    with secrets.on_stdin({"HF_TOKEN": TOKEN}):
        env = {**clean, secrets.DESCRIPTOR: os.environ[secrets.DESCRIPTOR], "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", SHOW], env=env, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["token"] == TOKEN and found["stdin"] == "" and not found["left"]
    assert not found["seen"] and not found["variables"]
    assert secrets.DESCRIPTOR not in os.environ


@linux
@pytest.mark.parametrize("name", secrets.HUB)
def test_a_program_starts_anew_without_its_token(name: str) -> None:
    """Its arguments and its input stay, and its children see nothing."""
    found = shown({name: f"{TOKEN}\n", "OAUTH_CLIENT_SECRET": "é=1\n2"})
    assert found == {
        "token": TOKEN,
        "seen": False,
        "arguments": ["one", "two words"],
        "stdin": "asked",
        "variables": [],
        "left": False,
        "dumpable": 0,
        "secret": "é=1\n2",
    }


@linux
def test_a_child_gets_its_token_through_a_pipe() -> None:
    with secrets.handed_on({"QUANTKIT_HF_TOKEN": TOKEN}) as (more, descriptors):
        assert TOKEN not in str(more)
        found = shown(more, pass_fds=descriptors)
    assert found["token"] == TOKEN and not found["seen"] and not found["left"]
    assert shown({})["token"] is None
    with secrets.handed_on({"QUANTKIT_HF_TOKEN": ""}) as (more, descriptors):
        assert shown({**more, "HF_TOKEN": TOKEN}, pass_fds=descriptors)["token"] is None
    assert shown({secrets.DESCRIPTOR: "77"})["token"] is None


def test_what_a_secret_is_called() -> None:
    for name in (*secrets.HUB, "QUANTKIT_SECRET", "OAUTH_CLIENT_SECRET", "AWS_SECRET_ACCESS_KEY",
                 "OPENAI_API_KEY", "my_password", "GITHUB_TOKEN"):  # fmt: skip
        assert secrets.is_secret(name), name
    for name in ("PATH", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "OAUTH_CLIENT_ID", "HF_HOME",
                 "GRADIO_TEMP_DIR", "SSH_AUTH_SOCK", secrets.DESCRIPTOR):  # fmt: skip
        assert not secrets.is_secret(name), name


def test_too_much_is_said_not_cut() -> None:
    with (
        pytest.raises(QuantkitError, match="BIG_TOKEN"),
        secrets.handed_on({"BIG_TOKEN": "x" * 99_999}),
    ):
        pass


def test_who_a_worker_works_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    monkeypatch.delenv("QUANTKIT_HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert process.worker_secrets(None, public=True) == {"QUANTKIT_HF_TOKEN": ""}
    assert process.worker_secrets(None, public=False) == {"HF_TOKEN": "hf_ours"}
    for public in (True, False):
        assert process.worker_secrets("hf_t", public) == {"QUANTKIT_HF_TOKEN": "hf_t"}
    monkeypatch.setenv("QUANTKIT_SECRET", "s")
    monkeypatch.setenv("OAUTH_CLIENT_ID", "i")
    child = process.worker_environment(os.environ)
    assert not {"HF_TOKEN", "QUANTKIT_SECRET", "OAUTH_CLIENT_ID"} & child.keys()
    assert child["PATH"] == os.environ["PATH"]


@linux
def test_the_command_line_hides_it() -> None:
    code = """
import sys
from quantkit import cli
def parser():
    print(open("/proc/self/environ").read())
    sys.exit()
cli._parser = parser
cli.main()
"""
    env = {**os.environ, "HF_TOKEN": TOKEN}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "PATH=" in done.stdout and TOKEN not in done.stdout


@pytest.mark.parametrize(
    "path",
    [
        "app.py",
        "quantkit/server/executors/hf_jobs/in_job.py",
        "quantkit/server/executors/hf_jobs/dispatch.py",
    ],
)
def test_every_program_hides_it_first(path: str) -> None:
    """Nothing is done before, when the file is run by itself."""
    module = ast.parse((Path(__file__).parents[2] / path).read_text())
    run_itself = [n for n in module.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n)]
    assert ast.unparse(run_itself[0].body[0]) == "secrets.hide()"


@linux
def test_a_job_hands_its_secret_to_python_alone(tmp_path: Path) -> None:
    """The shell that a Job starts with becomes `uv`, whose environment holds nothing."""
    seen = tmp_path / "seen"
    code = f"open({str(seen)!r}, 'wb').write(open('/proc/self/environ', 'rb').read())\n"
    command = ["sh", "-c", dispatch._IN_JOB, "sh", sys.executable, "-c", code + SHOW]
    done = subprocess.run(
        command, env={**os.environ, "HF_TOKEN": TOKEN}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f'"token": "{TOKEN}"' in done.stdout
    assert TOKEN.encode() not in seen.read_bytes()
