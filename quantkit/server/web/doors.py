"""The doors of the page: every route that it and the documented API need. All others are closed.

`tests/server/test_app_doors.py` holds this list against the routes of the installed Gradio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gradio

from quantkit.server.runs.texts import MOST_BYTES

# What a door asks of who knocks (see `gate`):
#   page     anybody, also from a link of another site
#   public   anybody; it is told nothing of the visitor
#   act      our own page with its token, or a caller without cookies
#   api      a caller by key or token: cookies are ignored
#   own      our own page or the address bar, with the visitor's cookie
Lasts = Literal["", "events", "file"]
Kind = Literal["page", "public", "act", "api", "own"]


@dataclass(frozen=True)
class Door:
    """Routes with the same rules."""

    methods: tuple[str, ...]
    path: re.Pattern[str]
    kind: Kind
    rate: str  # a name in RATES
    max_body: int = 0  # bytes of a request
    lasts: Lasts = ""  # what keeps its answer open for long


_ICONS = re.escape(str(Path(gradio.__file__).parent / "icons"))  # of the button to sign in
_READ = ("GET", "HEAD")
_NAME = r"[a-z_]{1,40}"
_ID = r"[A-Za-z0-9_-]{1,64}"
_MAX_BODY = 262_144  # the form's longest field has ten thousand characters


def _door(
    methods: tuple[str, ...], pattern: str, kind: Kind, rate: str, body: int = 0, lasts: Lasts = ""
) -> Door:
    return Door(methods, re.compile(pattern, re.ASCII), kind, rate, body, lasts)


DOORS = (
    _door(_READ, r"/", "page", "page"),
    _door(("GET",), r"/login/(?:huggingface|callback)", "page", "sign"),
    _door(("GET",), r"/logout", "own", "sign"),
    _door(("GET",), r"/session", "own", "page"),
    _door(_READ, r"/(?:assets|static|svelte)/[A-Za-z0-9_./-]{1,200}", "public", "static"),
    _door(_READ, r"/(?:favicon\.ico|robots\.txt|manifest\.json)", "public", "static"),
    _door(_READ, r"/pwa_icon(?:/[0-9]{1,4})?", "public", "static"),
    _door(_READ, r"(?:/gradio_api)?/theme\.css", "public", "static"),
    _door(_READ, rf"/gradio_api/file={_ICONS}/[a-z-]+\.svg", "public", "static"),
    _door(("GET",), r"/config/?", "public", "page"),
    _door(("GET",), r"/gradio_api/(?:info/?|app_id|mcp/schema)", "public", "page"),
    _door(("GET",), r"/gradio_api/startup-events", "public", "page"),
    _door(("POST",), r"/gradio_api/run/predict", "act", "act", _MAX_BODY),
    _door(("POST",), r"/gradio_api/queue/join", "act", "act", _MAX_BODY),
    _door(("GET",), r"/gradio_api/queue/data", "act", "act", lasts="events"),
    _door(("POST",), r"/gradio_api/(?:cancel|reset)", "act", "act", 4096),
    _door(("POST",), rf"/gradio_api/call(?:/v2)?/{_NAME}", "api", "api", _MAX_BODY),
    _door(("GET",), rf"/gradio_api/call(?:/v2)?/{_NAME}/{_ID}", "api", "api", lasts="events"),
    _door(("POST",), r"/gradio_api/mcp/?", "api", "api", _MAX_BODY, lasts="events"),
    _door(("GET", "DELETE"), r"/gradio_api/mcp/?", "api", "api", lasts="events"),
    _door(("POST",), r"/texts", "act", "text", 4 * MOST_BYTES // 3 + 1000),
    _door(_READ, r"/files/[^/]{1,100}/[^/]{1,255}", "own", "file", lasts="file"),
    _door(("GET",), rf"/archive/{_ID}", "own", "file", lasts="file"),
    _door(_READ, rf"/shared/{_ID}(?:/[^/]{{1,255}})?", "public", "file", lasts="file"),
)

# Times in seconds, for an address and for a visitor. A page asks every two seconds, and many
# people may share an address; what costs more has limits of its own (`rate_limit.ALLOWED`).
RATES = {
    "page": (600, 60.0),
    "static": (6000, 60.0),
    "act": (6000, 60.0),
    "api": (600, 60.0),
    "file": (600, 60.0),
    "text": (12, 60.0),
    "sign": (60, 60.0),
}


def find(method: str, path: str) -> tuple[Door | None, bool]:
    """Return the door of a request, and whether its path has one for another method."""
    if ".." in path:
        return None, False
    there = [door for door in DOORS if door.path.fullmatch(path)]
    return next((door for door in there if method in door.methods), None), bool(there)
