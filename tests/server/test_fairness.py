"""Nobody fills Gradio's queue: what one address has waiting in it is bounded."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from quantkit.server.web.fairness import WAITING_EACH, FairQueue


def blocks(*addresses: str) -> Any:
    """What the middleware looks at of Gradio's queue, with one request of each address waiting."""
    events = [
        SimpleNamespace(request=SimpleNamespace(client=SimpleNamespace(host=a))) for a in addresses
    ]
    line = SimpleNamespace(queue=events)
    return SimpleNamespace(_queue=SimpleNamespace(event_queue_per_concurrency_id={"x": line}))


def asked(waiting: Any, address: str, path: str = "/gradio_api/queue/join") -> int:
    """The status of a request."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "client": (address, 1)}
    asyncio.run(FairQueue(app, waiting)(scope, None, send))
    return int(sent[0]["status"])


def test_one_address_has_a_few_places() -> None:
    full = blocks(*["10.0.0.1"] * WAITING_EACH)
    assert asked(full, "10.0.0.1") == 429
    assert asked(full, "10.0.0.1", "/gradio_api/call/estimate") == 429
    assert asked(full, "10.0.0.2") == 200
    assert asked(full, "10.0.0.1", "/gradio_api/run/predict") == 200
    assert asked(blocks(*["10.0.0.1"] * (WAITING_EACH - 1)), "10.0.0.1") == 200
