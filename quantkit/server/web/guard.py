"""Keeps the repository's folder `spaces/` from being taken for the package of that name.

On a Space, Gradio does `import spaces` and uses what it finds. With our folder next to `app.py`
that succeeds with an empty namespace package, and Gradio then fails on its missing attributes.
"""

from __future__ import annotations

import importlib.util
import sys


def hide_spaces_folder() -> None:
    """Make `import spaces` fail where it would only find a folder. Call before importing gradio.

    The real package, where it is installed, has an `__init__.py` and is left alone.
    """
    try:
        spec = importlib.util.find_spec("spaces")
    except (ImportError, ValueError):  # ValueError: hidden already
        return
    if spec is not None and spec.origin is None:
        sys.modules["spaces"] = None  # type: ignore[assignment]
