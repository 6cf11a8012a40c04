"""Routes beside Gradio's: result files in ranges, all of a run's as one archive, and the read-only
page of a result that its owner opened up.

Gradio's file components would copy a GGUF into its cache, and its static paths are public.
"""

from __future__ import annotations

import base64
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradio.utils import get_space
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from quantkit.errors import QuantkitError
from quantkit.server.runs import texts
from quantkit.server.runs.store import RunStore
from quantkit.server.web import shared
from quantkit.server.web.form_handlers import known
from quantkit.server.web.visitor import Visitors

_CHUNK = 1 << 20
_READ = ["GET", "HEAD"]
# Of the page of a shared result: it has no script, and what is in it can load none.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)


def routes(store: RunStore, visitors: Visitors) -> list[Route]:
    """Return the routes of files; the gate has counted who asks."""

    def download(request: Request) -> Response:
        name = request.path_params["name"]
        owner = owner_of(request, visitors)
        return _file(lambda: store.result_path(request.path_params["job"], name, owner), name)

    def archive(request: Request) -> Response:
        try:
            owner = owner_of(request, visitors)
            paths = store.result_paths(request.path_params["job"], owner)
        except QuantkitError as error:
            return PlainTextResponse(str(error), 404)
        return _zip(paths)

    def show(request: Request) -> Response:
        try:
            run = store.shared(request.path_params["share"])
        except QuantkitError as error:
            return HTMLResponse(shared.nothing(error), 404, _HEADERS)
        return HTMLResponse(shared.page(run, request.path_params["share"]), 200, _HEADERS)

    def shared_file(request: Request) -> Response:
        name, share = request.path_params["name"], request.path_params["share"]
        return _file(lambda: store.shared_path(share, name), name, shown=name.endswith(".png"))

    def take_text(request: Request, body: bytes) -> Response:
        owner = owner_of(request, visitors)
        try:
            data = base64.b64decode(json.loads(body)["text"], validate=True)
            name, n = texts.keep(store.root, known(owner), data)
        except ValueError:
            return PlainTextResponse("That is not base64.", 422)
        except QuantkitError as error:
            return PlainTextResponse(str(error), 422)
        return JSONResponse({"id": name, "n_characters": n})

    async def take(request: Request) -> Response:
        return await run_in_threadpool(take_text, request, await request.body())

    return [
        Route("/texts", take, methods=["POST"]),
        Route("/files/{job}/{name}", download, methods=_READ),
        Route("/archive/{job}", archive, methods=["GET"]),
        Route("/shared/{share}", show, methods=_READ),
        Route("/shared/{share}/{name}", shared_file, methods=_READ),
    ]


_HEADERS = {
    "content-security-policy": _POLICY,
    "cache-control": "no-store",
    "x-robots-tag": "noindex",
}


def _file(find: Any, name: str, shown: bool = False) -> Response:
    """A file from disk, to be kept, or a picture to be shown."""
    try:
        path = find()
    except QuantkitError as error:
        return PlainTextResponse(str(error), 404)
    return FileResponse(
        path,
        filename=name,
        media_type="image/png" if shown else "application/octet-stream",
        content_disposition_type="inline" if shown else "attachment",
        headers={"cache-control": "private, no-cache"},
    )


class _Pipe:
    """What a ZipFile writes to, taken out piece by piece."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Do nothing: nothing is kept back."""

    def taken(self) -> bytes:
        found = b"".join(self._parts)
        self._parts.clear()
        return found


def _zip(paths: dict[str, Path]) -> Response:
    """All files as an archive that is made while it is sent; weights do not get smaller."""

    def parts() -> Iterator[bytes]:
        pipe = _Pipe()
        with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as made:  # type: ignore[call-overload]
            for name, path in paths.items():
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                with path.open("rb") as source, made.open(entry, "w", force_zip64=True) as into:
                    while piece := source.read(_CHUNK):
                        into.write(piece)
                        yield pipe.taken()
        yield pipe.taken()

    headers = {"content-disposition": 'attachment; filename="quantkit.zip"'}
    return StreamingResponse(parts(), media_type="application/zip", headers=headers)


def owner_of(request: Request, visitors: Visitors) -> str | None:
    """Return who asks for a file: the signed-in Hub user, the cookie, or an API caller's key."""
    if get_space() is not None:
        signed_in = request.scope.get("session", {}).get("oauth_info") or {}
        user = (signed_in.get("userinfo") or {}).get("preferred_username")
        if user and signed_in.get("expires_at", 0) > time.time():
            return f"hf:{user}"
    visitor = visitors.of_cookies(request.cookies) or visitors.check(
        request.headers.get("x-quantkit-key")
    )
    return None if visitor is None else f"visitor:{visitor}"
