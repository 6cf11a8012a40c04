"""Start the page: `quantkit app`, or `app.py` on a Space.

Nothing may import Gradio before this: it reports to its makers by default, and takes a folder
`spaces/` for a package.
"""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout

from quantkit.sandbox import secrets
from quantkit.server.web.guard import hide_spaces_folder


def serve(say: Callable[[str], object], port: int | None = None) -> None:
    """Serve the page until this process is ended, and say where. Raises QuantkitError where it
    cannot start.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    secrets.put_back("OAUTH_CLIENT_SECRET")  # for Gradio's sign-in
    hide_spaces_folder()
    from quantkit.server.web.server import launch, make_page

    app, store, visitors = make_page()
    # Python stops everything to look for garbage: what is there now is none and is left out.
    gc.collect()
    gc.freeze()
    with redirect_stdout(io.StringIO()):  # Gradio advertises itself, quiet or not
        _, address, _ = launch(
            app, store, visitors, server_port=port, prevent_thread_lock=True, quiet=True
        )
    say(f"The page: {address}\nIts runs: {store.root.absolute()}\nCtrl+C ends it.")
    app.block_thread()
