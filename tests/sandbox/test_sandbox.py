"""Attacks from inside the sandbox, as whoever runs the tests and as a plain user, with every layer
and with each of the strong ones left out.

pytest tests/sandbox/test_sandbox.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sandbox_attacks

from evaluators import sandbox as kernel

pytestmark = pytest.mark.skipif(
    not kernel.KNOWN_MACHINE, reason="the kernel's interfaces are those of Linux"
)

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "support"
WHO = ["as it is", "plain user"] if os.geteuid() == 0 else ["as it is"]
# With fewer layers less holds, but each alone keeps what it is there for.
LAYERS: dict[str, tuple[str, ...]] = {
    "all": (),
    "no mounts": ("mounts",),
    "no namespaces": ("namespaces",),
    "no Landlock": ("landlock",),
}
KINDS = ["started", "forked"]  # by a fork server
NAMES = list(sandbox_attacks.attacks("", "", 1, ""))

# The parent: it has a token, an open file and memory worth reading.
PARENT = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from quantkit import sandbox
folder = Path({folder!r})
secret = open(folder / "secret")
def attacked(without):
    job = sandbox.Job(
        "sandbox_attacks:go",
        dict(names=None, secret=str(folder / "secret"), outside=str(folder / "outside"),
             parent=os.getpid(), writable=str(folder / "writable")),
        sandbox.Limits(30, 60, 2**30, 2**20),
        writable=[folder / "writable"], path=[{here!r}], without=without, preload={preload!r},
    )
    with sandbox.Child(job) as child:
        (*_, last) = [m for m in child.messages() if m]
    ended = child.ended
    assert ended.forked == {preload!r}
    return [vars(last), str(ended), ended.log[-3000:], str(ended.protection)]
print(json.dumps({{name: attacked(without) for name, without in {layers!r}.items()}}))
"""


def as_someone(who: str, code: str, folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A process that runs `code`, with a token in its environment."""
    command = [sys.executable, "-c", code]
    if who == "plain user":
        command = [sys.executable, str(HERE / "plain_user.py"), *command]
    env = {**os.environ, "HF_TOKEN": "hf_secretsecret", "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(command, env=env, **options)


@cache
def place(who: str) -> Path:
    """A folder of that user, with a secret in it."""
    folder = Path(tempfile.mkdtemp(prefix="attack-", dir="/tmp"))
    for name in ("outside", "writable", "tmp"):
        (folder / name).mkdir()
    (folder / "outside" / "something").write_text("")
    (folder / "secret").write_text("the user's own")
    (folder / "secret").chmod(0o600)
    folder.chmod(0o755)
    if who == "plain user":
        for path in (folder, *folder.iterdir()):
            os.chown(path, 12345, 12345)
    return folder


@cache
def outcomes(who: str, kind: str) -> dict[str, tuple[dict[str, str | None], str]]:
    """By layers: what got through, and what was in force."""
    folder = place(who)
    code = PARENT.format(
        root=str(ROOT), here=str(HERE), folder=str(folder), layers=LAYERS, preload=kind == "forked"
    )
    child = as_someone(who, code, folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err.decode()
    found = {}
    for layers, (last, ended, log, protection) in json.loads(out).items():
        assert last["kind"] == "value", (last, ended, log)
        found[layers] = (last["content"], protection)
    return found


@pytest.fixture(scope="module", autouse=True)
def clean() -> Iterator[None]:
    yield
    for who in WHO:
        subprocess.run(["rm", "-rf", str(place(who))], check=True)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_it_does_not_get_through(name: str, kind: str, who: str, layers: str) -> None:
    found, protection = outcomes(who, kind)[layers]
    assert found[name] is None, protection
    assert (place(who) / "secret").read_text() == "the user's own"


@pytest.mark.parametrize("who", WHO)
def test_a_fork_has_the_same_protection(who: str) -> None:
    started, forked = (
        {layers: protection for layers, (_, protection) in outcomes(who, kind).items()}
        for kind in KINDS
    )
    assert started == forked
