"""Keep one address from filling Gradio's queue.

Gradio has one line for everything that is queued and refuses all when it is full, and it keeps what
nobody comes to hear forever. What an address may have of both is far below that.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.errors import QuantkitError
from quantkit.sandbox.untrusted import Damaged, parse

WAITING_EACH = 5
UNHEARD_EACH = 64  # answers; a page hears its own within a second, and asks with every key typed
_QUEUES = ("/gradio_api/queue/join", "/gradio_api/call/")
_SAID = "You have several requests waiting already. Wait for one of them to be answered."


class FairQueue:
    """ASGI middleware: answers with a sentence at once instead of queueing one address's sixth
    request, and drops the oldest of its answers that nobody has come to hear. It stands behind
    whatever finds out the address: `scope["client"]` is believed.
    """

    def __init__(self, app: ASGIApp, blocks: Any, waiting_each: int = WAITING_EACH) -> None:
        self._app = app
        self._blocks = blocks
        self._waiting_each = waiting_each
        self._asked: dict[str, list[str]] = {}  # address -> its events, oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        joins = scope["type"] == "http" and scope["method"] == "POST"
        if not joins or not scope["path"].startswith(_QUEUES):
            await self._app(scope, receive, send)
            return
        address = scope["client"][0] if scope.get("client") else ""
        if waiting(self._blocks)[address] < self._waiting_each:
            await self._app(scope, receive, self._noting(address, send))
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"5")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        body = json.dumps({"detail": _SAID}).encode()
        await send({"type": "http.response.body", "body": body})

    def _noting(self, address: str, send: Send) -> Send:
        """A `send` that notes which event the application has made."""

        async def noting(message: Message) -> None:
            body = message.get("body", b"")
            if message["type"] == "http.response.body" and len(body) < 200:
                self._note(address, body)
            await send(message)

        return noting

    def _note(self, address: str, body: bytes) -> None:
        try:
            made = parse(body)
        except (Damaged, QuantkitError):
            return
        if not isinstance(made, dict) or not isinstance(made.get("event_id"), str):
            return
        queue = self._blocks._queue
        sessions = queue.pending_event_ids_session
        for session in [name for name, events in sessions.items() if not events]:
            del sessions[session]  # all of it was heard
        unheard = set().union(*sessions.values())
        for key, events in list(self._asked.items()):
            self._asked[key] = [event for event in events if event in unheard]
            if not self._asked[key]:
                del self._asked[key]
        mine = self._asked.setdefault(address, [])
        mine.append(made["event_id"])
        # Those that wait or are at work have bounds of their own.
        done = [event for event in mine if event not in queue.event_ids_to_events]
        for event in done[: max(0, len(mine) - UNHEARD_EACH)]:
            forget(queue, event)
            mine.remove(event)


def waiting(blocks: Any) -> Counter[str]:
    """Return how many requests of each address wait in Gradio's queue."""
    queues = list(blocks._queue.event_queue_per_concurrency_id.values())
    events = [event for queue in queues for event in list(queue.queue)]
    return Counter(event.request.client.host if event.request.client else "" for event in events)


def forget(queue: Any, event: str) -> None:
    """Drop what Gradio keeps of an event that has ended."""
    session = next((s for s, ids in queue.pending_event_ids_session.items() if event in ids), None)
    if session is None:
        return
    queue.pending_event_ids_session[session].discard(event)
    messages = queue.pending_messages_per_session.get(session)
    for _ in range(messages.qsize() if messages is not None else 0):
        message = messages.get_nowait()
        if message.event_id != event:
            messages.put_nowait(message)
    if not queue.pending_event_ids_session[session]:
        del queue.pending_event_ids_session[session]
        queue.pending_messages_per_session.pop(session, None)
