"""Decide who can see what is published: those who can see its sources, unless the user says
otherwise.
"""

from __future__ import annotations

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo
from quantkit.config import RunConfig


def why_private(config: RunConfig, info: ModelInfo) -> str | None:
    """Return a clause on why the repository of a run is made private; None if it is made public.

    A model of the Hub is asked for again, by nobody in particular: it may have been closed since.
    Raises QuantkitError when the Hub does not answer.
    """
    if config.private:
        return "it was asked for"
    if config.public:
        return None
    return next((said for one in _sources(info) if (said := _why_closed(one))), None)


def closed(info: ModelInfo) -> str:
    """Return what the model or its base was when it was looked at: "private", "gated" or ""."""
    sources = _sources(info)
    if any(one.private for one in sources):
        return "private"
    return "gated" if any(one.gated for one in sources) else ""


def _sources(info: ModelInfo) -> list[ModelInfo]:
    """A LoRA's base is half of what is published."""
    return [one for one in (info, info.base) if one is not None]


def _why_closed(info: ModelInfo) -> str | None:
    if said := closed(info):
        return f"{info.id} is {said}"
    # A local folder is named so only in the Hub's cache.
    is_of_hub = info.kind == "hub" or "/" in info.id
    if is_of_hub and not hub.is_open(info.id):
        return f"{info.id} is not open to everyone"
    return None
