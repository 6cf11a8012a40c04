"""Serve the page: Gradio behind the gate, and downloads straight from disk."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
from typing import Any

import gradio as gr
from gradio import http_server
from gradio.utils import get_space
from starlette.middleware import Middleware

from quantkit.sandbox import secrets
from quantkit.sandbox.untrusted import shortened
from quantkit.server.runs.mirror import Mirror, state_folder
from quantkit.server.runs.store import RunStore, open_store
from quantkit.server.web import downloads, listen
from quantkit.server.web.bodies import Events
from quantkit.server.web.fairness import FairQueue
from quantkit.server.web.gate import Gate
from quantkit.server.web.origin import Places
from quantkit.server.web.page import build_app
from quantkit.server.web.theme import CSS_PATH, HEAD, make_theme
from quantkit.server.web.visitor import Visitors


class OneLine(logging.Filter):
    """For the root logger, by which MCP's library repeats a hundred lines of each request that it
    does not understand: the first line is enough, and nobody fills the log.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shortened(record.getMessage().partition("\n")[0], 200), ()
        return True


def make_page() -> tuple[gr.Blocks, RunStore, Visitors]:
    """Make the page of the store that the environment describes."""
    store = open_store()
    kept_in = state_folder(os.environ)
    if kept_in is not None:
        mirror = Mirror(store.root, kept_in)
        mirror.restore()
        mirror.start()
        atexit.register(mirror.close)
    visitors = Visitors.of_root(store.root, secrets.everything())
    return build_app(store, visitors), store, visitors


def launch(
    app: gr.Blocks, store: RunStore, visitors: Visitors, **options: Any
) -> tuple[Any, str, str]:
    """Start the scheduler and listen; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where."""
    places = Places.of(os.environ, get_space() is not None)

    def start_server(
        app: Any, server_name: str | None = None, server_port: int | None = None, **_: Any
    ) -> Any:
        gate = Gate(app, visitors, places, Events.of(app.blocks))
        return listen.serve(gate, places, server_name, server_port)

    logging.getLogger().addFilter(OneLine())
    # Gradio looks it up there when it launches.
    http_server.start_server = start_server  # type: ignore[assignment]
    store.start()
    return app.launch(
        theme=make_theme(),
        css_paths=CSS_PATH,
        head=HEAD,
        ssr_mode=False,
        run_history=False,  # the form holds a token
        show_error=False,
        footer_links=["api"],
        max_file_size="1mb",
        enable_monitoring=False,
        state_session_capacity=100,  # the page keeps nothing in them, and strangers can make them
        mcp_server=importlib.util.find_spec("mcp") is not None,
        app_kwargs={
            "routes": downloads.routes(store, visitors),
            "middleware": [Middleware(FairQueue, blocks=app)],
        },
        **options,
    )
