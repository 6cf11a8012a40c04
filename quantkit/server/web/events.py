"""How the page's events are wired to what the handlers do: who asks, and what is said to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from quantkit.server.web.handlers import Handlers


def asked(handlers: Handlers, action: Callable[..., Any]) -> Callable[..., Any]:
    """Return an event's function: `action(client, token, *values)`. The token is that of whoever is
    signed in, else empty.
    """

    def event(
        request: gr.Request,
        user: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        *values: Any,
    ) -> Any:
        return action(handlers.client(request, user), oauth.token if oauth else "", *values)

    return event


def growing(handlers: Handlers, action: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    """Return the same for an action that yields what it knows so far."""
    answer = asked(handlers, action)

    def event(
        request: gr.Request,
        user: gr.OAuthProfile | None,
        oauth: gr.OAuthToken | None,
        *values: Any,
    ) -> Iterator[Any]:
        yield from answer(request, user, oauth, *values)

    return event


def quietly(trigger: Callable[..., Any], action: Callable[..., Any], given: Any, shown: Any) -> Any:
    """Wire what is answered at once: without the queue, and without a sign of being at work."""
    return trigger(
        action, given, shown, queue=False, show_progress="hidden", api_visibility="private"
    )


def said(html: str) -> Any:
    """Return the update of a notice; an empty one is not there."""
    return gr.update(value=html, visible=bool(html))
