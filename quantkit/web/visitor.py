"""Who is asking: the Hub user on a Space, elsewhere whoever holds an unguessable signed cookie."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import cookie_parser

COOKIE = "quantkit_visitor"
_FORM = re.compile(r"([A-Za-z0-9_-]{24})\.([0-9a-f]{64})", re.ASCII)
_SECONDS = 400 * 24 * 3600  # the longest that browsers keep a cookie


class Visitors:
    """Gives out and checks signed visitor keys. The same secret must be used after a restart."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def of_root(cls, root: Path, environment: Mapping[str, str]) -> Visitors:
        """With QUANTKIT_SECRET, else with a secret kept beside the jobs, readable by us only."""
        given = environment.get("QUANTKIT_SECRET")
        if given:
            return cls(given.encode())
        root.mkdir(parents=True, exist_ok=True)
        path = root / ".secret"
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(secrets.token_bytes(32))
        except FileExistsError:
            pass
        return cls(path.read_bytes())

    def new_key(self) -> str:
        visitor = secrets.token_urlsafe(18)
        return f"{visitor}.{self._sign(visitor)}"

    def check(self, key: object) -> str | None:
        """The visitor of a key; None for a forged one."""
        match = _FORM.fullmatch(key) if isinstance(key, str) else None
        if match is None or not hmac.compare_digest(self._sign(match[1]), match[2]):
            return None
        return match[1]

    def of_cookies(self, cookies: Mapping[str, Any]) -> str | None:
        return self.check(cookies.get(COOKIE))

    def _sign(self, visitor: str) -> str:
        return hmac.new(self._secret, visitor.encode(), hashlib.sha256).hexdigest()


_MAX_BODY = 1_000_000  # bytes of a request: the form's longest field has ten thousand characters
# The page has no upload and shows no file of another server.
_CLOSED = ("/gradio_api/upload", "/gradio_api/proxy=", "/gradio_api/stream/")
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self'"
    " blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " connect-src 'self' blob: data:; object-src 'none'; base-uri 'self'; form-action 'self';"
    " frame-ancestors "
)
_FRAMES = "'self' https://huggingface.co https://*.hf.space"


class VisitorCookie:
    """ASGI middleware: answers a page request of a visitor without a cookie with a new one, adds
    the headers that every answer has, and turns away what no part of the page sends.
    """

    def __init__(self, app: Any, visitors: Visitors, framed: bool) -> None:
        self._app = app
        self._visitors = visitors
        self._framed = framed  # on a Space the page lives in a frame of the Hub's

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = _refusal(scope["path"], headers)
        if refused is not None:
            await _refuse(send, *refused)
            return
        cookie = b""
        if scope["path"] == "/" and scope["method"] == "GET":
            if self._visitors.of_cookies(_cookies(headers)) is None:
                secure = scope.get("scheme") == "https" or (
                    headers.get(b"x-forwarded-proto", b"").split(b",")[0].strip() == b"https"
                )
                cookie = self._set_cookie(secure)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"same-origin"),
                ]
                ancestors = _FRAMES if self._framed else "'self'"
                added.append((b"content-security-policy", f"{_POLICY}{ancestors}".encode()))
                if not self._framed:
                    added.append((b"x-frame-options", b"SAMEORIGIN"))
                if cookie:
                    added += [(b"set-cookie", cookie), (b"cache-control", b"no-store")]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _set_cookie(self, secure: bool) -> bytes:
        # A frame of another site sends a cookie only when it says so, and only over https.
        site = "SameSite=None; Secure" if self._framed and secure else "SameSite=Lax"
        if secure and "Secure" not in site:
            site += "; Secure"
        key = self._visitors.new_key()
        return f"{COOKIE}={key}; Path=/; Max-Age={_SECONDS}; HttpOnly; {site}".encode()


def _refusal(path: str, headers: Mapping[bytes, bytes]) -> tuple[int, str] | None:
    """The status and sentence for a request that is not answered; None for any other."""
    if path.startswith(_CLOSED):
        return 404, "There is nothing here."
    length = headers.get(b"content-length", b"0")
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        return 411, "Say how long the request is."
    if not length.isdigit() or len(length) > 12 or int(length) > _MAX_BODY:
        return 413, f"A request may have {_MAX_BODY:,} bytes."
    return None


async def _refuse(send: Any, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})


def _cookies(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """As the page's handlers read them: one that is odd, another application's, hides no other."""
    return cookie_parser(headers.get(b"cookie", b"").decode("latin-1"))
