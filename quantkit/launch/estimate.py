"""What a run would take, asked of `python -m quantkit plan` in a process of its own.

The planner reads configs and tokenizers that strangers wrote and starts the converter: none of
that happens in the server, and a visitor's token reaches it through a pipe only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from quantkit import secrets
from quantkit.config import TARGET_OPTIONS, RunConfig
from quantkit.errors import QuantkitError
from quantkit.launch.process import worker_environment, worker_secrets
from quantkit.launch.sizes import with_sizes

_SECONDS = 180
_AT_ONCE = threading.BoundedSemaphore(2)
_KEPT = 64
_cache: dict[str, dict[str, Any]] = {}
_locks: dict[str, threading.Lock] = {}
_locks_lock = threading.Lock()


def estimate(config: RunConfig, token: str | None = None, public: bool = False) -> dict[str, Any]:
    """The plan of a run as JSON values. Raises QuantkitError with the planner's own sentence.

    The model is looked at once; another size of it is answered at once.
    """
    key = _key(config, token)
    with _locks_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # whoever asks the same meanwhile waits for this answer
        plan = _cache.get(key)
        if plan is None:
            plan = _ask_in_turn(config, token, public)
            while len(_cache) >= _KEPT:
                oldest = next(iter(_cache))
                _cache.pop(oldest, None)
                _locks.pop(oldest, None)
            _cache[key] = plan
    return with_sizes(plan, config)


def known_plan(config: RunConfig, token: str | None = None) -> dict[str, Any] | None:
    """The plan when the model was looked at before; None when it would have to be."""
    plan = _cache.get(_key(config, token))
    return None if plan is None else with_sizes(plan, config)


def _key(config: RunConfig, token: str | None) -> str:
    """What the planner's answer depends on; answers for a token are for that token alone."""
    asked = dataclasses.replace(
        config, targets=(), seed=0, publish=None, private=False, public=False
    )
    return hashlib.sha256(f"{asked!r} {token or ''}".encode()).hexdigest()


def _ask_in_turn(config: RunConfig, token: str | None, public: bool) -> dict[str, Any]:
    if not _AT_ONCE.acquire(timeout=20):
        raise QuantkitError("Too many previews are being made.", "Try again in a minute.")
    try:
        return _ask(config, token, public)
    finally:
        _AT_ONCE.release()


def _ask(config: RunConfig, token: str | None, public: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="quantkit-preview-") as folder:
        command = [sys.executable, "-m", "quantkit", "plan", *_arguments(config, Path(folder))]
        try:
            with secrets.handed_on(worker_secrets(token, public)) as (more, descriptors):
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_SECONDS,
                    env={**worker_environment(os.environ), **more},
                    pass_fds=descriptors,
                    start_new_session=True,
                )
        except subprocess.TimeoutExpired:
            raise QuantkitError(
                "The preview took too long.", "Start the run without it, or try again."
            ) from None
    if done.returncode == 0:
        try:
            plan = json.loads(done.stdout.decode("utf-8", "replace").strip().splitlines()[-1])
        except (ValueError, IndexError):
            plan = None
        if isinstance(plan, dict):
            return plan
    raise QuantkitError(_sentence(done.stderr.decode("utf-8", "replace")))


def _arguments(config: RunConfig, folder: Path) -> list[str]:
    """The command line of `plan`; values are joined to their options, so none reads as one."""
    arguments = ["--json", f"--profile={config.profile}", f"--device={config.device}"]
    if config.targets:
        option = TARGET_OPTIONS[config.targets[0].kind]
        arguments.append(f"--{option}={','.join(t.value for t in config.targets)}")
    if config.revision:
        arguments.append(f"--revision={config.revision}")
    if config.levels:
        arguments.append(f"--levels={','.join(config.levels)}")
    arguments.append(f"--methods={','.join(config.methods)}")
    if config.types:
        path = folder / "types.json"
        path.write_text(json.dumps(dict(config.types)), "utf-8")
        arguments.append(f"--types={path}")
    return [*arguments, "--", config.model]


def _sentence(stderr: str) -> str:
    """The last sentence that the command line printed for people; never a traceback."""
    for line in reversed(stderr.strip().splitlines()):
        if line.startswith("quantkit: "):
            return line.removeprefix("quantkit: ")
    return "The preview could not be made. Start the run without it, or try again."
