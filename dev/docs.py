"""Write into the docs what the code knows: the tables of profiles (docs/options.md) and of
calibration mixes (docs/calibration.md). `--check`: fail when stale.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from quantkit.config import PROFILES
from quantkit.config.calibration import HUB_TEXTS, MIXES
from quantkit.markdown import table

ROOT = Path(__file__).parent.parent


def profiles() -> str:
    headers = [
        *("profile", "calibration tokens", "search tokens", "tuning steps", "levels", "meant for")
    ]
    rows = [
        [
            f"`{name}`",
            f"{p.calibration_tokens:,}",
            f"{p.search_tokens:,}",
            str(p.tuning_steps),
            " ".join(p.levels),
            p.about,
        ]
        for name, p in PROFILES.items()
    ]
    return table(headers, rows)


_SOURCES = {
    "docs": "documentation that CPython ships",
    "code": "CPython's standard library",
    "prose": "written by the model",
    "dialogue": "written by the model",
}


def mixes() -> str:
    rows = []
    for mix, weights in MIXES.items():
        for name, weight in weights.items():
            share = f"{100 * weight / sum(weights.values()):.0f} %"
            rows.append([f"`{mix}`", f"`{name}`", share, _source(name)])
    return table(["mix", "text", "share", "source"], rows)


def _source(name: str) -> str:
    if name in MIXES:
        return "the mix of that name"
    if name in HUB_TEXTS:
        text = HUB_TEXTS[name]
        return f"{text.repo}, {text.config}" if text.config else text.repo
    return _SOURCES[name.partition("-")[0]]


def filled(text: str, marker: str, content: str) -> str:
    """`text` with everything between the marker and its end replaced."""
    pattern = re.compile(rf"<!-- {marker} -->.*?<!-- end -->", re.DOTALL)
    new, n = pattern.subn(lambda _: f"<!-- {marker} -->\n{content}\n<!-- end -->", text)
    if n != 1:
        raise SystemExit(f"there are {n} markers {marker}")
    return new


def main() -> int:
    stale = False
    for path, marker, content in (
        ("docs/options.md", "profiles", profiles()),
        ("docs/calibration.md", "mixes", mixes()),
    ):
        text = (ROOT / path).read_text("utf-8")
        new = filled(text, marker, content)
        stale |= new != text
        if "--check" not in sys.argv:
            (ROOT / path).write_text(new, "utf-8")
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
