"""The web page of quantkit: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import gc
import os
import sys

# Before Gradio is imported: it reports to its makers by default, and takes `spaces/` for a package.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from quantkit.sandbox import secrets

if __name__ == "__main__":
    secrets.hide()  # may start this program anew
    secrets.put_back("OAUTH_CLIENT_SECRET")  # for Gradio's sign-in

from quantkit.errors import QuantkitError
from quantkit.server.web.guard import hide_spaces_folder

hide_spaces_folder()


def main() -> int:
    from quantkit.server.web.server import launch, make_page

    try:
        page = make_page()
        # Python stops everything to look for garbage: what is there now is none and is left out.
        gc.collect()
        gc.freeze()
        launch(*page)
    except QuantkitError as error:
        sys.stderr.write(f"quantkit: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
