"""The names of the nine stages, in their order, and of their folders."""

from __future__ import annotations

NAMES = (
    "fetch",
    "convert",
    "calibrate",
    "quantize",
    "search",
    "tune",
    "stitch",
    "validate",
    "publish",
)


def stage_folder(stage: str) -> str:
    """Return the name of a stage's folder, `4-quantize`."""
    return f"{NAMES.index(stage) + 1}-{stage}"
