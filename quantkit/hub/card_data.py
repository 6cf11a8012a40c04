"""The YAML at the top of a model card, which strangers write: without aliases, by which 400 bytes
become gigabytes, and of a bounded length.
"""

from __future__ import annotations

import json

import yaml

from quantkit.errors import QuantkitError
from quantkit.sandbox.untrusted import Settings

_MAX_BYTES = 2_000_000  # cards with thousands of results of evaluations have 500 kB
_DEEPEST = 50
_REMEDY = "Write the header as plain YAML, without & and *."


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of values only


def front_matter(card: bytes) -> bytes:
    """Return what lies between the first two lines of three dashes; nothing without them."""
    lines = card[: _MAX_BYTES + 8].removeprefix(b"\xef\xbb\xbf").lstrip().splitlines(keepends=True)
    if not lines or lines[0].rstrip() != b"---":
        return b""
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == b"---"), None)
    if end is None and len(card) <= _MAX_BYTES:
        return b""
    if end is None:
        raise QuantkitError(
            f"The YAML header of the card has more than {_MAX_BYTES:,} bytes.", _REMEDY
        )
    return b"".join(lines[1:end])


def _check_events(text: bytes) -> None:
    """Raise YAMLError for an alias, and for values so deep in others that a stack might not do."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            raise yaml.YAMLError


def read_card(card: bytes) -> Settings:
    """Read the settings at the top of a card as JSON values. Raises QuantkitError if they are not
    plain YAML.
    """
    try:
        text = front_matter(card)
        _check_events(text)
        value = yaml.load(text, _LOADER)
        # Dates and the like become texts: YAML has them, JSON has none.
        value = json.loads(json.dumps(value, default=str))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise QuantkitError(
            f"The header of the card is not plain YAML ({type(error).__name__}).", _REMEDY
        ) from None
    return Settings(value if isinstance(value, dict) else None)
