"""Estimate what a run would take, by `quantkit.server.previews.plan_child` in a process of its own.

The planner reads headers, configs and tokenizers that strangers wrote and starts the converter:
none of that happens in the server. Its processes have little memory and time, a visitor's token
reaches them through a pipe only, they end with the server, and visitors take turns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from quantkit.config import PROFILES, RunConfig
from quantkit.errors import NeedsToken, QuantkitError
from quantkit.files import write_json
from quantkit.planning.nouns import Plan, Times
from quantkit.sandbox import secrets
from quantkit.sandbox.untrusted import Damaged, build, parse
from quantkit.server.executors.process import worker_environment, worker_secrets
from quantkit.server.previews.first_look import FirstLook
from quantkit.server.previews.sizes import with_sizes
from quantkit.server.previews.turns import Turns

Looked = Callable[[FirstLook], None]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The limits of one preview. For a page they are several times what today's models need; by the
    clock it takes longer beside runs, which a preview leaves the cores to.
    """

    busy_seconds: float
    seconds: float
    memory_bytes: int


_PUBLIC = Bounds(60, 240, 1_500_000_000)
_PRIVATE = Bounds(600, 1200, 16_000_000_000)
_KEEPER = Path(__file__).with_name("keeper.py")
_REMEDY = "Start the run without it, or try again."
_PUBLIC_REMEDY = "Try again in ten minutes."  # a public page starts nothing that it has not planned
_MOST_TOLD_BYTES = 16_000_000
_KEPT = 64
_REFUSED_SECONDS = 600.0  # what was cut off is not tried again for so long
_turns = Turns()


class CutOff(QuantkitError):
    """A preview exceeded its limits."""


@dataclasses.dataclass(eq=False)
class _Known:
    """The answer to one question; whoever asks the same meanwhile waits at its lock."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    plan: Plan | None = None
    refusal: CutOff | None = None
    until: float = 0.0  # so long it is refused


_known: dict[str, _Known] = {}
_known_lock = threading.Lock()


def estimate(
    config: RunConfig,
    token: str | None = None,
    public: bool = False,
    who: str = "",
    looked: Looked | None = None,
) -> Plan:
    """Return the plan of a run. Raises QuantkitError with the planner's own sentence.

    The model is looked at once; another size of it is answered at once. `who` is whose turn is
    taken; `looked` is called with the first facts, when they are known before the rest.
    """
    plan = _plan(config, token)
    if plan is None:
        with _turns.turn(who):
            plan = _known_or_asked(config, token, public, looked)
    return with_sizes(plan, config)


def _known_or_asked(
    config: RunConfig, token: str | None, public: bool, looked: Looked | None
) -> Plan:
    key = _key(config, token)
    with _known_lock:
        known = _known.setdefault(key, _Known())
        while len(_known) > _KEPT:
            _known.pop(next(iter(_known)))
    with known.lock:
        if known.refusal is not None and time.monotonic() < known.until:
            raise known.refusal
        try:
            known.plan = known.plan or _ask(config, token, public, looked)
        except CutOff as error:
            known.refusal, known.until = error, time.monotonic() + _REFUSED_SECONDS
            raise
        except BaseException:
            _known.pop(key, None)  # what was not answered takes no place
            raise
        return known.plan


def known_plan(config: RunConfig, token: str | None = None) -> Plan | None:
    """Return the plan if the model was planned before, else None."""
    plan = _plan(config, token)
    return None if plan is None else with_sizes(plan, config)


def known_times(config: RunConfig, token: str | None = None) -> dict[str, Times]:
    """Return what the run takes with each profile, if the model was planned with any; else
    nothing.
    """
    for profile in PROFILES:
        try:
            plan = known_plan(dataclasses.replace(config, profile=profile), token)
        except QuantkitError:  # its types cannot make the sizes
            continue
        if plan is not None:
            return plan.profiles
    return {}


def _plan(config: RunConfig, token: str | None) -> Plan | None:
    known = _known.get(_key(config, token))
    return None if known is None else known.plan


def _key(config: RunConfig, token: str | None) -> str:
    """What the planner's answer depends on; answers for a token are for that token alone."""
    asked = dataclasses.replace(
        config, targets=(), seed=0, publish=None, private=False, public=False
    )
    return hashlib.sha256(f"{asked!r} {token or ''}".encode()).hexdigest()


def _ask(config: RunConfig, token: str | None, public: bool, looked: Looked | None) -> Plan:
    bounds = _PUBLIC if public else _PRIVATE
    with tempfile.TemporaryDirectory(
        prefix="quantkit-preview-", ignore_cleanup_errors=True
    ) as folder:
        # Whatever it leaves in its folder for temporary files goes with this one.
        asked = write_json(Path(folder) / "asked.json", config)
        limits = [str(n) for n in (bounds.memory_bytes, bounds.busy_seconds, bounds.seconds)]
        packages = str(Path(psutil.__file__).parents[1])
        command = [sys.executable, "-m", "quantkit.server.previews.plan_child", str(asked)]
        with secrets.handed_on(worker_secrets(token, public)) as (more, descriptors):
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_KEEPER), packages, *limits, *command],
                stdin=subprocess.PIPE,  # closes with this process: then it ends
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**worker_environment(os.environ), **more, "TMPDIR": folder},
                pass_fds=descriptors,
                start_new_session=True,
            )
        with child:
            try:
                return _answer(child, looked, _PUBLIC_REMEDY if public else _REMEDY)
            finally:
                assert child.stdin is not None
                child.stdin.close()


def _answer(child: subprocess.Popen[bytes], looked: Looked | None, remedy: str = _REMEDY) -> Plan:
    """The plan that the child tells; what it says is checked like anything from outside."""
    assert child.stdout is not None
    plan: Plan | None = None
    left = _MOST_TOLD_BYTES
    while line := child.stdout.readline(left + 1):
        left -= len(line)
        try:
            told = parse(line) if left >= 0 else None
            if not isinstance(told, dict):
                break
            if "looked" in told and looked is not None:
                looked(build(FirstLook, told["looked"]))
            elif "plan" in told:
                plan = build(Plan, told["plan"])
            elif "error" in told:
                message, step = told["error"]
                raise QuantkitError(str(message)[:2000], str(step)[:2000])
            elif "needs_token" in told:
                message, step = told["needs_token"]
                raise NeedsToken(str(message)[:2000], str(step)[:2000])
            elif told.get("ended") in ("memory", "time"):
                raise CutOff(f"The preview took too much {told['ended']}.", remedy)
        except (Damaged, ValueError, TypeError):
            break
    if plan is None:
        raise QuantkitError("The preview could not be made.", remedy)
    return plan
