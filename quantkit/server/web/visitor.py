"""Identify the visitor: the Hub user on a Space, elsewhere the holder of an unguessable signed
cookie.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import cookie_parser

COOKIE = "quantkit_visitor"
SIGNED_IN = "session"  # Gradio's, of who signed in with the Hub
TOKEN = "x-quantkit-page"  # the header of the page's token
_FORM = re.compile(r"([A-Za-z0-9_-]{24})\.([0-9a-f]{64})", re.ASCII)
_SECONDS = 400 * 24 * 3600  # the longest that browsers keep a cookie


class Visitors:
    """Gives out and checks signed visitor keys. The same secret must be used after a restart."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def of_root(cls, root: Path, environment: Mapping[str, str]) -> Visitors:
        """Make it with QUANTKIT_SECRET, else with a secret kept next to the runs, readable by us
        only.
        """
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
        """Return the visitor of a key; None for a forged one."""
        match = _FORM.fullmatch(key) if isinstance(key, str) else None
        if match is None or not hmac.compare_digest(self._sign(match[1]), match[2]):
            return None
        return match[1]

    def of_cookies(self, cookies: Mapping[str, Any]) -> str | None:
        """Return the visitor's cookie, of those that the gate let through: one of both names."""
        return self.check(cookies.get(cookie_name(True)) or cookies.get(COOKIE))

    def cookie(self, https: bool, framed: bool) -> str:
        """Return a new visitor's cookie, as a Set-Cookie header."""
        # A frame of another site sends a cookie only when it says so, and only over https.
        site = "SameSite=None" if framed and https else "SameSite=Lax"
        secure = "; Secure" if https else ""
        kept = f"Path=/; Max-Age={_SECONDS}; HttpOnly; {site}{secure}"
        return f"{cookie_name(https)}={self.new_key()}; {kept}"

    def page_token(self, visitor: str) -> str:
        """Return what the visitor's page sends with each request: no other site's page can know
        it.
        """
        return self._sign(f"page {visitor}")

    def check_page(self, visitor: str | None, token: object) -> bool:
        if visitor is None or not isinstance(token, str) or not token.isascii():
            return False
        return hmac.compare_digest(self.page_token(visitor), token)

    def place(self, address: str) -> str:
        """Return what is stored of where a visitor comes from: nobody without the secret can undo
        it.
        """
        return self._sign(f"place {address}")

    def own(self, visitor: str, session: str) -> str:
        """Return a name for a visitor's session that nobody else can ask for."""
        return self._sign(f"session {visitor} {session}")[:40]

    def _sign(self, visitor: str) -> str:
        return hmac.new(self._secret, visitor.encode(), hashlib.sha256).hexdigest()


def cookie_name(https: bool) -> str:
    """Return the cookie's name; over https one that no other host can set, not even a sibling site
    or a plain http page.
    """
    return f"__Host-{COOKIE}" if https else COOKIE


def parse_cookies(headers: Iterable[tuple[bytes, bytes]], names: Collection[str]) -> dict[str, str]:
    """Return the cookies of these names, as the page's handlers read them: an odd cookie of another
    application hides no other, and thousands of others cost nothing.

    Of a name that comes twice none counts: one of the two is somebody else's.
    """
    found: dict[str, str] = {}
    twice = set()
    for header, value in headers:
        for part in value.decode("latin-1").split(";") if header == b"cookie" else ():
            if part.partition("=")[0].strip() not in names:
                continue
            for key, text in cookie_parser(part).items():
                if key in found:
                    twice.add(key)
                found[key] = text
    return {key: text for key, text in found.items() if key not in twice}
