"""The page of a result that its owner opened up: no script, no form, nothing of who made it, and
the same escaping as everywhere.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.server.runs.view import RunView
from quantkit.server.web import results
from quantkit.server.web.theme import CSS_PATH
from quantkit.server.web.view import macro, model_name, notice

_page = macro("shared")
_PICTURE = "frontier.png"


def page(run: RunView, share: str) -> str:
    """Return a finished run for everybody who has its link."""
    root = f"{share}/"
    if Path(run.model).is_absolute():  # a folder of the machine that made it
        run = replace(run, model=model_name(run.model))
    picture = next((f.name for f in run.files if f.is_here and f.name == _PICTURE), "")
    return _page(run, style(), results.results(run, root), results.report(run), picture, root)


def nothing(error: QuantkitError) -> str:
    """Return the page of a link that leads nowhere, or no longer."""
    return _page(None, style(), notice(error.message, error.remedy), "", "", "")


@cache
def style() -> str:
    """Return the page's rules for a page without Gradio's switch between light and dark."""
    rules = CSS_PATH.read_text("utf-8")
    dark = re.search(r"^\.dark \.gradio-container,[^{]*\{(.*?)^\}", rules, re.MULTILINE | re.DOTALL)
    assert dark is not None
    by_system = f"@media (prefers-color-scheme: dark) {{ .gradio-container {{{dark[1]}}} }}"
    return f"{rules}\n{by_system}"
