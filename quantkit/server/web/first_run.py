"""What a Space still lacks, for its owner: a duplicate has no bucket, and may have no sign-in."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.server.executors.registry import EXECUTORS
from quantkit.server.runs.mirror import state_folder


def missing(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return what is missing and what to do about it; nothing outside a Space."""
    if environment.get("SYSTEM") != "spaces":
        return ()
    found = []
    if not environment.get("OAUTH_CLIENT_ID"):
        found.append(
            (
                "Nobody can sign in.",
                "Put hf_oauth: true into the README of this Space, and restart it.",
            )
        )
    found += [lack for executor in EXECUTORS.values() if (lack := executor.lacks()) is not None]
    if state_folder(environment) is None:
        found.append(
            (
                "Runs are lost when this Space restarts.",
                "Mount a storage bucket at /data, in the settings of this Space.",
            )
        )
    return tuple(found)
