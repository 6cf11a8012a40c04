"""The headers that every answer has, and the answers that the gate gives itself."""

from __future__ import annotations

from starlette.types import Message, Send

from quantkit.server.web.origin import HUB

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self'"
    " blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " connect-src 'self' blob: data:; object-src 'none'; base-uri 'self'; form-action 'self';"
    " frame-ancestors 'self'"
)


class Answer:
    """One answer on its way out: `send` for the application behind, the rest for the gate."""

    def __init__(self, send: Send, framed: bool) -> None:
        self._send = send
        self.started = self.complete = False
        # On a Space the page lives in a frame of the Hub's, and of nobody else's.
        policy = f"{_POLICY} {HUB}" if framed else _POLICY
        self._headers = [
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"content-security-policy", policy.encode()),
        ]
        if not framed:
            self._headers.append((b"x-frame-options", b"SAMEORIGIN"))

    def allow_origin(self, origin: str, cookies: bool) -> None:
        """Let scripts of an origin read the answer."""
        self._headers += [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"vary", b"Origin"),
        ]
        if cookies:
            self._headers.append((b"access-control-allow-credentials", b"true"))

    def set_cookie(self, cookie: str) -> None:
        self._headers += [(b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]

    async def send(self, message: Message) -> None:
        """Pass on what the application sends. A failure of its own is one line, not its page."""
        if message["type"] == "http.response.start":
            self.started = True
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                if not name.lower().startswith(b"access-control-")
            ]
            # A page of ours that needs less has a policy of its own.
            own = {name.lower() for name, _ in kept} & {b"content-security-policy"}
            added = [header for header in self._headers if header[0] not in own]
            message = {**message, "headers": [*kept, *added]}
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def text(
        self, status: int, body: str, *headers: tuple[bytes, bytes], last: bool = False
    ) -> None:
        """Send the whole answer. `last` closes the connection, whose request may not have been
        read.
        """
        content = body.encode()
        more = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
        more.append((b"content-length", str(len(content)).encode()))
        if last:
            more.append((b"connection", b"close"))
        await self.send(
            {"type": "http.response.start", "status": status, "headers": [*more, *headers]}
        )
        await self.send({"type": "http.response.body", "body": content})

    async def refuse(self, status: int, sentence: str) -> None:
        """Say one sentence, unless the answer has begun: then it just ends."""
        if not self.started:
            wait = ((b"retry-after", b"10"),) if status == 429 else ()
            await self.text(status, sentence, *wait, last=True)

    async def end(self) -> None:
        """Finish a stream that has been open for long enough."""
        if self.started and not self.complete:
            await self.send({"type": "http.response.body", "body": b""})
