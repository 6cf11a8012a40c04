"""The names of the stages, in their order."""

from __future__ import annotations

STAGES = (
    "fetch",
    "convert",
    "calibrate",
    "quantize",
    "database",
    "search",
    "stitch",
    "validate",
    "publish",
)
