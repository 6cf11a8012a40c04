"""The web page of quantkit: `python app.py`, then open the address that it prints."""

from __future__ import annotations

import sys

from quantkit.sandbox import secrets

if __name__ == "__main__":
    secrets.hide()  # may start this program anew

from quantkit.errors import QuantkitError
from quantkit.server.web.start import serve


def main() -> int:
    try:
        serve(lambda text: sys.stderr.write(f"{text}\n"))
    except QuantkitError as error:
        sys.stderr.write(f"quantkit: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
