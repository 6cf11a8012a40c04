"""Read a request's body with limits, before it is used."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Receive

BODY_SECONDS = 20.0  # for the whole body, however it trickles in
MAX_DEPTH = 32
MAX_VALUES = 300  # in lists and objects together: Gradio walks them all, in its only thread
_MAX_BRACKETS = 12_000  # a long text may be full of them
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


class Refused(Exception):
    """The request is answered with a status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


@dataclass(frozen=True)
class Events:
    """The valid requests: the number of inputs of every event, the events that wait in the queue,
    and the arguments of every endpoint (true for required ones).
    """

    inputs: Mapping[int, int]
    queued: frozenset[int]
    arguments: Mapping[str, Mapping[str, bool]]
    pending: Callable[[str], bool]  # whether something is to be told to a session
    called: Callable[[str], bool]  # the same of a call; an event of a session is none

    @classmethod
    def of(cls, blocks: Any) -> Events:
        """Return the events of a page."""
        described = blocks.get_api_info()["named_endpoints"]
        arguments = {
            name.removeprefix("/"): {
                p["parameter_name"]: not p["parameter_has_default"] for p in endpoint["parameters"]
            }
            for name, endpoint in described.items()
        }
        queue = blocks._queue

        def pending(name: str) -> bool:
            return name in queue.pending_messages_per_session

        def called(name: str) -> bool:
            return name in queue.pending_event_ids_session.get(name, ())

        here = {number: fn for number, fn in blocks.fns.items() if fn.fn}  # others are scripts
        inputs = {number: len(fn.inputs) for number, fn in here.items()}
        queued = frozenset(number for number, fn in here.items() if fn.queue)
        return cls(inputs, queued, arguments, pending, called)


async def read_body(receive: Receive, length: int) -> bytes:
    """Read the whole body. Raises Refused if it does not come in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "The request ended early.")
                body += message.get("body", b"")
                if len(body) > length:
                    raise Refused(413, "The request is longer than it said.")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, "The request took too long.") from None


def parse(body: bytes) -> Any:
    """Parse JSON that is neither deep nor wide. Raises Refused for anything else."""
    # Before it is parsed: many new objects make Python look through all that it has.
    if body.count(b"[") + body.count(b"{") > _MAX_BRACKETS:
        raise Refused(400, f"The request's JSON has more than {MAX_VALUES} values.")
    try:
        value = orjson.loads(body)  # refuses depth by itself before it would matter
    except orjson.JSONDecodeError:
        raise Refused(400, "The request is not JSON.") from None
    level: list[Any] = [value]
    left = MAX_VALUES
    for _ in range(MAX_DEPTH):
        left -= sum(len(part) for part in level if isinstance(part, (dict, list)))
        if left < 0:
            raise Refused(400, f"The request's JSON has more than {MAX_VALUES} values.")
        level = [x for part in level for x in _inside(part)]
        if not level:
            return value
    raise Refused(400, "The request's JSON is too deep.")


def _inside(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in parts if isinstance(part, (dict, list)))


def check_event(body: Any, path: str, events: Events) -> None:
    """Check a request for an event of the page. Raises Refused for what cannot be one."""
    if not isinstance(body, dict):
        raise Refused(400, "The request is not a JSON object.")
    _check_strings(body)
    if path.endswith(("/cancel", "/reset")):
        return
    number, data = body.get("fn_index"), body.get("data")
    if not isinstance(number, int) or isinstance(number, bool) or number not in events.inputs:
        raise Refused(404, "There is no such event.")
    if not isinstance(data, list) or len(data) != events.inputs[number]:
        raise Refused(422, f"The event takes {events.inputs[number]} values.")
    if path.endswith("/run/predict") and number in events.queued:
        raise Refused(404, "That event has a queue: join it.")
    if path.endswith("/queue/join") and body.get("session_hash") is None:
        raise Refused(422, "The request names no session.")
    if body.get("batched"):
        raise Refused(422, "The events take no batches.")


def check_text(body: Any) -> None:
    """Check a request that sends a text: `{"text": base64}`. Raises Refused."""
    if not isinstance(body, dict) or body.keys() != {"text"} or not isinstance(body["text"], str):
        raise Refused(422, "Send a text, as base64.")


def check_call(body: Any, path: str, events: Events) -> None:
    """Check a request to a documented endpoint. Raises Refused."""
    name = check_name(path, events)
    if not isinstance(body, dict):
        raise Refused(400, "The request is not a JSON object.")
    _check_strings(body)
    known = events.arguments[name]
    if not path.startswith("/gradio_api/call/v2/"):
        data = body.get("data")
        if not isinstance(data, list) or len(data) > len(known):
            raise Refused(422, f"{name} takes a list of at most {len(known)} values as data.")
        return
    if body.keys() - known.keys() - {"oauth_token"}:
        raise Refused(422, f"{name} takes these arguments: {', '.join(known)}.")
    if missing := [
        argument for argument, needed in known.items() if needed and argument not in body
    ]:
        raise Refused(422, f"{name} needs these arguments: {', '.join(missing)}.")


def check_name(path: str, events: Events) -> str:
    """Return the endpoint of a path under `call/`. Raises Refused."""
    name = path.removeprefix("/gradio_api/call/").removeprefix("v2/").partition("/")[0]
    if name not in events.arguments:
        raise Refused(404, "There is no such endpoint.")
    return name


def check_session(value: Any) -> None:
    """Raise Refused for what names no session and no event."""
    if value is not None and not (isinstance(value, str) and _SESSION.fullmatch(value)):
        raise Refused(422, "The session is not a name.")


def _check_strings(body: Mapping[str, Any]) -> None:
    check_session(body.get("session_hash"))
    check_session(body.get("event_id"))
    if not isinstance(body.get("oauth_token"), str | None):
        raise Refused(422, "The token is not a text.")
