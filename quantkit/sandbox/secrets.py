"""Keep this process's secrets in its memory, where no other process can read them.

The environment that a process was started with can be read as long as it lives (/proc/PID/environ).
So a program of ours that finds a secret there starts itself anew without (`hide`), and hands the
secret on through a pipe, whose number is in QUANTKIT_SECRETS_FD. Children get theirs the same way
(`handed_on`). From then on nobody may look into the process: it is not dumpable.

    hide         first thing in every program of ours
    get          instead of os.environ.get, for the name of a secret
    handed_on    what subprocess.Popen needs to give secrets to a child of ours
    without      an environment for children that get none
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from evaluators import sandbox
from quantkit.errors import QuantkitError

HUB = ("QUANTKIT_HF_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
DESCRIPTOR = "QUANTKIT_SECRETS_FD"

# Whole words of a name; HF_TOKEN_PATH and the like name a place, not a secret.
_SECRET = re.compile(
    r"(?:.*_)?(?:TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|(?:API|ACCESS|PRIVATE)_?KEY)"
    r"(?:_(?!PATH|FILE|FD|URL|DIR).*)?",
    re.IGNORECASE,
)
_MOST_BYTES = 60_000  # what a pipe takes at once

_taken: dict[str, str] = {}


def is_secret(name: str) -> bool:
    """Return whether a variable of this name holds something that only its owner may know."""
    return _SECRET.fullmatch(name) is not None and name != DESCRIPTOR


def get(name: str) -> str | None:
    """Return the secret of that name, wherever it came from."""
    _receive()  # for a program that was not told to hide anything
    return _taken.get(name, os.environ.get(name))


def everything() -> dict[str, str]:
    """Return the environment as it would be if it held the secrets. Never give it to a child."""
    _receive()
    return {**os.environ, **_taken}


def put_back(name: str) -> None:
    """Put secrets back into os.environ, for a library that looks nowhere else. That is this
    process's memory; what can be read from outside is what it was started with.
    """
    if name in _taken:
        os.environ[name] = _taken[name]


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without secrets."""
    return {name: v for name, v in environment.items() if not (v and is_secret(name))}


def hide() -> None:
    """Take secrets out of this process's environment, for good: it may not return, but start the
    same program anew. To be called first thing, before anything is done or read from stdin.
    """
    _receive()
    open_ones = {n: v for n, v in os.environ.items() if v and is_secret(n)}
    if open_ones and sys.platform != "win32":
        reading = _pipe_with({**_taken, **open_ones})
        os.set_inheritable(reading, True)
        clean = {**without(os.environ), DESCRIPTOR: str(reading)}
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], clean)
    sandbox.set_not_dumpable()


@contextmanager
def handed_on(values: Mapping[str, str]) -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """Return additions to a child's environment, and the descriptors that it has to inherit
    (`pass_fds`). The child calls `hide`.
    """
    if not values:
        yield {}, ()
        return
    reading = _pipe_with(values)
    try:
        yield {DESCRIPTOR: str(reading)}, (reading,)
    finally:
        os.close(reading)


@contextmanager
def on_stdin(values: Mapping[str, str]) -> Iterator[None]:
    """Hand secrets on through the standard input of this process, for a library that starts
    children and takes no descriptors. The first child that calls `hide` has them: the others must
    not have DESCRIPTOR in their environment by then.
    """
    before = os.dup(0)
    reading = _pipe_with(values)
    os.dup2(reading, 0)
    os.close(reading)
    os.environ[DESCRIPTOR] = "0"
    try:
        yield
    finally:
        del os.environ[DESCRIPTOR]
        os.dup2(before, 0)
        os.close(before)


def _receive() -> None:
    """What the parent, or this program before it started itself anew, has put into the pipe."""
    number = os.environ.pop(DESCRIPTOR, "")
    if not number.isdecimal():
        return
    try:
        with open(int(number), "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError:  # inherited by name alone
        return
    if number == "0":
        os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free: the standard input
    for entry in data.decode("utf-8", "surrogateescape").split("\0"):
        name, equals, value = entry.partition("=")
        if equals:
            _taken[name] = value.rstrip("\n")


def _pipe_with(values: Mapping[str, str]) -> int:
    data = "\0".join(f"{name}={value}" for name, value in values.items())
    encoded = data.encode("utf-8", "surrogateescape")
    if len(encoded) > _MOST_BYTES:
        raise QuantkitError(
            f"The secrets in the environment have {len(encoded):,} bytes, more than a pipe holds.",
            f"Unset those that quantkit does not need: {', '.join(sorted(values))}.",
        )
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        file.write(encoded)
    return reading
