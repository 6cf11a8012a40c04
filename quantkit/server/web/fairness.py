"""Nobody fills the queue: a bound on how much of one address waits in Gradio's.

Gradio has one line for everything that is queued and refuses all when it is full. What an address
may have in it is far below that.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

WAITING_EACH = 5
_QUEUES = ("/gradio_api/queue/join", "/gradio_api/call/")
_SAID = "You have several requests waiting already. Wait for one of them to be answered."


class FairQueue:
    """ASGI middleware: answers with a sentence at once instead of queueing one address's sixth
    request. It stands behind whatever finds out the address: `scope["client"]` is believed.
    """

    def __init__(self, app: Any, blocks: Any, waiting_each: int = WAITING_EACH) -> None:
        self._app = app
        self._blocks = blocks
        self._waiting_each = waiting_each

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        joins = scope["type"] == "http" and scope["method"] == "POST"
        if not joins or not scope["path"].startswith(_QUEUES) or self._has_room(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"5")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        body = json.dumps({"detail": _SAID}).encode()
        await send({"type": "http.response.body", "body": body})

    def _has_room(self, scope: Any) -> bool:
        address = scope["client"][0] if scope.get("client") else ""
        return waiting(self._blocks)[address] < self._waiting_each


def waiting(blocks: Any) -> Counter[str]:
    """How many requests of each address wait in Gradio's queue."""
    queues = list(blocks._queue.event_queue_per_concurrency_id.values())
    events = [event for queue in queues for event in list(queue.queue)]
    return Counter(event.request.client.host if event.request.client else "" for event in events)
