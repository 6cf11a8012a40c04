"""The labels by which a server finds its own Jobs again."""

from __future__ import annotations

from collections.abc import Mapping

_APP_LABEL = {"app": "quantkit"}


def app_labels(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the Jobs of this very server have in common."""
    return {**_APP_LABEL, "space": _label(environment.get("SPACE_ID", "none"))}


def _label(text: str) -> str:
    """Text fit for a label: letters, digits, dashes and underscores, at most 100."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in text)[:100]
