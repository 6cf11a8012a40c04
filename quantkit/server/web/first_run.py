"""What a Space still lacks, and what its machine is good for: a duplicate has no bucket, and may
have no sign-in. Everybody reads it: who the owner is, a Space without sign-in cannot tell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit import hub
from quantkit.machine.kind import has_gpu, memory_here, uses_gpu
from quantkit.server.executors.registry import EXECUTORS
from quantkit.server.runs.mirror import state_folder
from quantkit.server.web import words

# The part of a Space's README that sign-in needs; spaces/deploy.py puts it there.
SIGN_IN = """\
hf_oauth: true
hf_oauth_expiration_minutes: 2880
hf_oauth_scopes:
- gated-repos
- contribute-repos
- jobs
"""
SCOPES = frozenset(line[2:] for line in SIGN_IN.splitlines() if line.startswith("- "))
_README = (
    "Its owner puts these lines between the lines of three dashes at the top of its README, in"
    " place of others that begin with hf_oauth. The Space then starts anew."
)


@dataclass(frozen=True)
class Missing:
    """Something that a Space lacks, and what its owner can do about it."""

    what: str
    remedy: str
    address: str  # where
    place: str  # what is there
    lines: str = ""  # to be put there


def missing(environment: Mapping[str, str]) -> tuple[Missing, ...]:
    """Return what is missing; nothing outside a Space."""
    if environment.get("SYSTEM") != "spaces":
        return ()
    space = f"{hub.endpoint()}/spaces/{environment.get('SPACE_ID', '')}"
    settings = f"{space}/settings", "Its settings"
    found = []
    if unable := _unable(environment):
        readme = f"{space}/edit/main/README.md", "Edit its README"
        found.append(Missing(unable, _README, *readme, SIGN_IN))
    reader = words.of_page(sign_in=True, public=True)
    for executor in EXECUTORS.values():
        if (lack := executor.lacks()) is not None:
            found.append(Missing(lack[0], reader.words(lack[1]), *settings))
    if has_gpu() and not uses_gpu(environment) and not environment.get("SPACES_ZERO_GPU"):
        what = "Runs do not use the GPU: PyTorch is built for processors alone here."
        remedy = "Its owner takes the line with download.pytorch.org out of its requirements.txt."
        place = f"{space}/edit/main/requirements.txt", "Edit its requirements.txt"
        found.append(Missing(what, remedy, *place))
    if state_folder(environment) is None:
        remedy = "Its owner mounts a storage bucket at /data."
        found.append(Missing("Runs are lost when this Space restarts.", remedy, *settings))
    return tuple(found)


def _unable(environment: Mapping[str, str]) -> str:
    """What nobody can do here for want of sign-in, or of its scopes."""
    if not environment.get("OAUTH_CLIENT_ID"):
        return "Nobody can sign in."
    given = environment.get("OAUTH_SCOPES")
    lacks = sorted(SCOPES - set(given.split())) if given else []
    if not lacks:
        return ""
    return f"Who signs in may not do everything: {', '.join(lacks)} must be in hf_oauth_scopes."


def duplicate(environment: Mapping[str, str]) -> str:
    """Return the address that makes a copy of this Space."""
    return f"{hub.endpoint()}/spaces/{environment.get('SPACE_ID', '')}?duplicate=true"


def hardware(environment: Mapping[str, str]) -> str:
    """Return what the machine of a Space means for runs."""
    cores = environment.get("CPU_CORES") or str(os.cpu_count() or 1)
    has = f"{cores} cores and {memory_here(environment) / 2**30:.0f} GiB of memory"
    if uses_gpu(environment):
        return f"This Space has a GPU, {has}: runs here use the GPU, and its owner pays for it."
    if environment.get("SPACES_ZERO_GPU"):
        return f"This Space has {has}. Runs do not use ZeroGPU, which lends a GPU for a minute."
    return f"This Space has {has}: small models run here, larger ones as Jobs."
