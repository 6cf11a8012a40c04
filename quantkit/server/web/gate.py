"""The gate in front of Gradio: it decides which requests come in, with whose cookies, how often.

Gradio answers any origin with credentials, keeps what strangers send, and has doors that nothing
here needs. It is given a request only when the gate has read and judged all of it.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import parse_qs, parse_qsl

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.errors import QuantkitError
from quantkit.server.web import bodies, doors
from quantkit.server.web.answers import Answer
from quantkit.server.web.bodies import Events, Refused
from quantkit.server.web.doors import Door
from quantkit.server.web.origin import FROM, HUB, Places, Site, counted, name_of
from quantkit.server.web.rate_limit import RateLimit
from quantkit.server.web.visitor import SIGNED_IN, TOKEN, Visitors, cookie_name, parse_cookies

logger = logging.getLogger(__name__)

AT_ONCE = {"address": 64, "visitor": 48}  # requests that are being answered
STREAMS = {"address": 64, "visitor": 24}  # answers that stay open: event streams, downloads
STREAM_SECONDS = 3600.0  # of an event stream
_MAX_RANGES = 4

_ONCE = ("host", "origin", "sec-fetch-site", "content-type", "content-length", TOKEN)
_KEYS = ("x-quantkit-key", "authorization", "x-hf-authorization")
# Settled here. Gradio would build addresses of some, and answer other origins for one.
_SETTLED = {
    *("host", "origin", "cookie", "forwarded", "x-real-ip", "x-gradio-server", "range"),
    *("x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto"),
    *("x-forwarded-prefix", "x-gradio-history-bucket", FROM),
}


class Gate:
    """ASGI application in front of Gradio's."""

    def __init__(self, app: ASGIApp, visitors: Visitors, places: Places, events: Events) -> None:
        self._app = app
        self._visitors = visitors
        self._places = places
        self._events = events
        self._rate_limit = RateLimit(allowed=doors.RATES)
        self._open: Counter[tuple[bool, str]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks WebSocket
            return
        answer = Answer(send, self._places.on_space)
        try:
            await _Request(self, scope, receive, answer).run()
        except Refused as refused:
            await answer.refuse(refused.status, refused.sentence)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__} at {where.name}:{where.lineno}"
            logger.error("%s %.80r failed: %s", scope["method"], scope["path"], what)
            await answer.refuse(500, "Something went wrong here. Try again.")

    def _count(self, door: Door, who: Mapping[str, str]) -> None:
        """Raises Refused for an address or a visitor that asks too often."""
        try:
            for kind, name in who.items():
                self._rate_limit.take(door.rate, f"{kind} {name}")
        except QuantkitError as error:
            raise Refused(429, str(error)) from None

    @contextmanager
    def _counted(self, door: Door, who: Mapping[str, str]) -> Iterator[None]:
        """Holds a place among the requests that are being answered. Raises Refused."""
        bounds = STREAMS if door.lasts else AT_ONCE
        keys = {(bool(door.lasts), f"{kind} {name}"): bounds[kind] for kind, name in who.items()}
        if any(self._open[key] >= bound for key, bound in keys.items()):
            raise Refused(429, "Too many requests at once. Try again.")
        self._open.update(keys.keys())
        try:
            yield
        finally:
            for key in keys:
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]


class _Request:
    """One request on its way in."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, answer: Answer) -> None:
        self._gate = gate
        self._places = gate._places
        self._scope = scope
        self._receive = receive
        self._answer = answer
        self._headers = _headers(scope)
        self._peer = scope["client"][0] if scope["client"] else ""
        self._https = scope["scheme"] == "https" or self._forwarded("proto") == "https"

    async def run(self) -> None:
        """Judge it, answer it or pass it on. Raises Refused."""
        headers, places, path = self._headers, self._places, self._scope["path"]
        if not places.serves(headers.get("host", "")):
            raise Refused(421, "This server has another name: docs/space.md says how to add one.")
        door = self._door()
        address = places.address(self._peer, headers)
        if self._scope["method"] == "OPTIONS":
            self._gate._count(door, {"address": counted(address)})
            return await self._answer.text(204, "", (b"access-control-allow-methods", b"GET, POST"))
        site = places.site(headers)
        if site == "other" and door.kind in ("act", "api", "own"):
            raise Refused(403, "Requests from other sites are refused.")
        cookies, visitor = self._cookies(door, site)
        who = {"address": counted(address)} | ({"visitor": visitor} if visitor else {})
        self._gate._count(door, who)
        length = self._length(door)
        with self._gate._counted(door, who):
            body = await bodies.read_body(self._receive, length) if length else b""
            if path == "/session":
                token = self._gate._visitors.page_token(visitor) if visitor else ""
                return await self._answer.text(200, token)
            body, query = self._checked(door, body, visitor)
            if path == "/" and visitor is None:
                cookie = self._gate._visitors.cookie(self._https, places.on_space)
                self._answer.set_cookie(cookie)
            await self._pass_on(door, who["address"], cookies, body, query)

    def _door(self) -> Door:
        """The door that the request is for; also allows its origin to read the answer."""
        scope, headers = self._scope, self._headers
        origin, asked = headers.get("origin", ""), scope["method"]
        if asked == "OPTIONS":
            asked = headers.get("access-control-request-method", "")
        door, known = doors.find(asked, scope["path"])
        encoded = b"%" in scope["raw_path"]  # only names of files need it
        if not known or "deep_link" in _names(scope["query_string"]):
            raise Refused(404, "There is nothing here.")
        if door is None:
            raise Refused(405, "This method is not allowed here.")
        if encoded and door.rate != "file":
            raise Refused(404, "There is nothing here.")
        if origin and self._places.owns(origin, headers.get("host", "")):
            self._answer.allow_origin(origin, cookies=True)
        elif origin == HUB and self._places.on_space and door.kind == "public":
            self._answer.allow_origin(origin, cookies=False)
        elif scope["method"] == "OPTIONS":
            raise Refused(403, "Requests from other sites are refused.")
        return door

    def _cookies(self, door: Door, site: Site) -> tuple[dict[str, str], str | None]:
        """The cookies that count, and the visitor of them. Raises Refused.

        A caller with a key or a token is known by that alone. What acts by a cookie needs the
        page's own origin, as far as the browser tells it, and the token that the page asked for;
        a caller that is no browser and has no such token has no cookies.
        """
        if door.kind in ("public", "api") or any(name in self._headers for name in _KEYS):
            return {}, None
        name = cookie_name(self._https)
        kept = parse_cookies(self._scope["headers"], (name, SIGNED_IN))
        visitor = self._gate._visitors.check(kept.get(name))
        if door.kind != "act" or not kept:
            return kept, visitor
        if self._gate._visitors.check_page(visitor, self._headers.get(TOKEN)):
            return kept, visitor
        if site == "own":
            raise Refused(403, "Reload the page: its session has changed.")
        return {}, None

    def _length(self, door: Door) -> int:
        """Bytes of the body. Raises Refused for one that is too long or of another kind."""
        if "transfer-encoding" in self._headers:
            raise Refused(411, "The request does not say how long it is.")
        text = self._headers.get("content-length", "0")
        if not text.isdecimal() or len(text) > 12 or int(text) > door.max_body:
            raise Refused(413, f"A request can have at most {door.max_body:,} bytes here.")
        kind = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        if int(text) and kind != "application/json":
            raise Refused(415, "Send JSON, and say so in the content type.")
        return int(text)

    def _checked(self, door: Door, body: bytes, visitor: str | None) -> tuple[bytes, bytes]:
        """Body and query as they are passed on. A visitor's sessions are the visitor's own: who
        knows the name of one cannot listen to it. Raises Refused.
        """
        path, query = self._scope["path"], self._scope["query_string"]
        events = self._gate._events

        def own(session: str) -> str:
            return session if visitor is None else self._gate._visitors.own(visitor, session)

        if self._scope["method"] == "POST":
            parsed = bodies.parse(body)
            if door.rate == "text":
                bodies.check_text(parsed)
            elif door.kind == "act":
                bodies.check_event(parsed, path, events)
                if parsed.get("session_hash") is not None:
                    body = orjson.dumps({**parsed, "session_hash": own(parsed["session_hash"])})
            elif path.startswith("/gradio_api/call/"):
                bodies.check_call(parsed, path, events)
        elif path == "/gradio_api/queue/data":
            session = parse_qs(query.decode("latin-1")).get("session_hash", [""])[0]
            bodies.check_session(session)
            if not events.pending(own(session)):
                raise Refused(404, "There is no such session.")
            query = b"session_hash=" + own(session).encode()
        elif path.startswith("/gradio_api/call/"):
            bodies.check_name(path, events)
            if not events.called(path.rpartition("/")[2]):
                raise Refused(404, "There is no such call.")
        return body, query

    async def _pass_on(
        self, door: Door, address: str, cookies: dict[str, str], body: bytes, query: bytes
    ) -> None:
        """Hand it to Gradio. `address` is what it is counted as: nothing behind looks further."""
        headers = [h for h in self._scope["headers"] if h[0].decode("latin-1") not in _SETTLED]
        headers = [h for h in headers if h[0] != b"content-length"]
        host = self._forwarded("host")
        host = host if name_of(host) in self._places.names else self._headers["host"]
        headers.append((b"host", host.encode("latin-1")))
        headers.append((FROM.encode(), self._places.passed_on(address)))
        if self._scope["method"] == "POST":
            headers.append((b"content-length", str(len(body)).encode()))
        if cookies:
            joined = "; ".join(f"{name}={value}" for name, value in cookies.items())
            headers.append((b"cookie", joined.encode("latin-1")))
        ranges = self._headers.get("range", "")
        if ranges and ranges.count(",") < _MAX_RANGES:
            headers.append((b"range", ranges.encode("latin-1")))
        scope = {
            **self._scope,
            "scheme": "https" if self._https else "http",
            "client": (address, 0),
            "query_string": query,
            "headers": headers,
        }
        try:
            async with asyncio.timeout(STREAM_SECONDS if door.lasts == "events" else None):
                await self._gate._app(scope, _replay(body, self._receive), self._answer.send)
        except TimeoutError:
            await self._answer.end()

    def _forwarded(self, what: str) -> str:
        """What a trusted proxy says of the request that it passes on."""
        if not self._places.trusts(self._peer):
            return ""
        return self._headers.get(f"x-forwarded-{what}", "").partition(",")[0].strip().lower()


def _headers(scope: Scope) -> dict[str, str]:
    """By name. Raises Refused where one comes twice that decides something."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        if key in found and key in _ONCE:
            raise Refused(400, f"The request has two headers {key}.")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _names(query: bytes) -> set[str]:
    """The names in a query as Gradio reads them, however they are written."""
    try:
        return {name for name, _ in parse_qsl(query.decode("latin-1"), True, max_num_fields=100)}
    except ValueError:
        raise Refused(400, "The address has too many parameters.") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then waits for the end of the connection."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
