"""Start the page: `quantkit app`, or `app.py` on a Space.

Nothing may import Gradio before this: it reports to its makers by default, and takes a folder
`spaces/` for a package.
"""

from __future__ import annotations

import gc
import os

from quantkit.sandbox import secrets
from quantkit.server.web.guard import hide_spaces_folder


def serve() -> None:
    """Serve the page until this process is ended. Raises QuantkitError where it cannot start."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    secrets.put_back("OAUTH_CLIENT_SECRET")  # for Gradio's sign-in
    hide_spaces_folder()
    from quantkit.server.web.server import launch, make_page

    page = make_page()
    # Python stops everything to look for garbage: what is there now is none and is left out.
    gc.collect()
    gc.freeze()
    launch(*page)
