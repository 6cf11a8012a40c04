"""Write into README.md what the code knows: the table of profiles. `--check`: fail when stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from quantkit.config import PROFILES
from quantkit.report import table

README = Path(__file__).parent.parent / "README.md"


def profiles() -> str:
    headers = ["profile", "calibration tokens", "search tokens", "levels", "meant for"]
    rows = [
        [
            f"`{name}`",
            f"{p.calibration_tokens:,}",
            f"{p.search_tokens:,}",
            " ".join(p.levels),
            p.about,
        ]
        for name, p in PROFILES.items()
    ]
    return table(headers, rows)


def filled(text: str, marker: str, content: str) -> str:
    """`text` with everything between the marker and its end replaced."""
    pattern = re.compile(rf"<!-- {marker} -->.*?<!-- end -->", re.DOTALL)
    new, n = pattern.subn(lambda _: f"<!-- {marker} -->\n{content}\n<!-- end -->", text)
    if n != 1:
        raise SystemExit(f"README.md has {n} markers {marker}")
    return new


def main() -> int:
    text = README.read_text("utf-8")
    new = filled(text, "profiles", profiles())
    if "--check" in sys.argv:
        return int(new != text)
    README.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
