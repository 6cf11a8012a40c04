"""The YAML at the top of a model card, which strangers write: without aliases, by which 400 bytes
become gigabytes, and of a bounded length.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from quantkit.errors import QuantkitError

_MAX_BYTES = 2_000_000  # cards with thousands of results of evaluations have 500 kB
_REMEDY = "Write the top of the card as plain YAML, without & and *."


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads values only, and none of them twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def front_matter(card: bytes) -> bytes:
    """What lies between the first two lines of three dashes; nothing where there are none."""
    lines = card[: _MAX_BYTES + 8].removeprefix(b"\xef\xbb\xbf").lstrip().splitlines(keepends=True)
    if not lines or lines[0].rstrip() != b"---":
        return b""
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == b"---"), None)
    if end is None and len(card) <= _MAX_BYTES:
        return b""
    if end is None:
        raise QuantkitError(f"The top of the card has more than {_MAX_BYTES:,} bytes.", _REMEDY)
    return b"".join(lines[1:end])


def read_card(card: bytes) -> dict[str, Any]:
    """The settings at the top of a card, as JSON values. Raises QuantkitError for what is no plain
    YAML.
    """
    try:
        value = yaml.load(front_matter(card), _PlainLoader)
        # Dates and the like become texts: YAML has them, JSON has none.
        value = json.loads(json.dumps(value, default=str))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise QuantkitError(
            f"The top of the card is no plain YAML ({type(error).__name__}).", _REMEDY
        ) from None
    return value if isinstance(value, dict) else {}
