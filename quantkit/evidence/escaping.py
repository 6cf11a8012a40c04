"""Escape strangers' words in our texts: what a model's card says is data, never markup, metadata of
another shape, or a link to anything but the web.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_MOST_LETTERS, _MOST_WORDS = 2000, 100
# What Markdown or HTML may act on. Entities stand for it: they are read in tables, too, where a
# backslash is escaped once more.
_ACTIVE = re.compile(
    r"[\\`*\[\]<>&|~@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+=-]|:(?=//)|(?<=www)\."
)
_SHAPES = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}"),
    "language": re.compile(r"[A-Za-z]{2,8}([_-][A-Za-z0-9]{1,8}){0,4}"),
    "pipeline_tag": re.compile(r"[a-z0-9][a-z0-9-]{0,60}"),
    "tags": re.compile(r"[\w][\w .:+/-]{0,100}"),
}
_PAGE = re.compile(r"[A-Za-z0-9][\w.-]{0,100}", re.ASCII)  # a file of the model's own repository


def plain(text: str) -> str:
    """Return one line of printable characters, not too long."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= _MOST_LETTERS else line[: _MOST_LETTERS - 1] + "…"


def markdown(text: str) -> str:
    """Escape the text so that Markdown shows it as it is written."""
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", plain(text))


def all_markdown(value: Any) -> Any:
    """Escape every string of a JSON value for Markdown, names too."""
    if isinstance(value, str):
        return markdown(value)
    if isinstance(value, list):
        return [all_markdown(item) for item in value]
    if isinstance(value, dict):
        return {markdown(key): all_markdown(item) for key, item in value.items()}
    return value


def web_link(link: Any, repo: str | None) -> str | None:
    """Return an address of the web, or of a file next to the model on the Hub; None for anything
    else.
    """
    if not isinstance(link, str) or len(link) > 500 or not link.isascii() or not link.isprintable():
        return None
    if repo is not None and _PAGE.fullmatch(link):
        return f"https://huggingface.co/{repo}/blob/main/{link}"
    try:
        address = urlsplit(link)
        is_web = address.scheme in ("http", "https") and bool(address.hostname)
    except ValueError:
        return None
    if not is_web or "@" in address.netloc:
        return None
    return quote(link, safe=":/?#=&%+,;~.-_")  # no bracket that could end a link


def repo_ids(value: Any) -> list[str]:
    """Return the ids of repositories among the names in a card."""
    return [text for text in _strings(value) if is_repo_id(text)]


def is_repo_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def metadata(card: Mapping[str, Any], repo: str | None) -> dict[str, Any]:
    """Return what is kept of a card's license, languages and task, each of its usual shape; the
    rest is left out.
    """
    kept: dict[str, str | list[str]] = {}
    for name in ("license", "language", "pipeline_tag"):
        found = [text for text in _strings(card.get(name)) if _SHAPES[name].fullmatch(text)]
        if found:
            kept[name] = found if isinstance(card[name], list) else found[0]
    own = card.get("license_name")
    if isinstance(own, str) and (short := plain(own)[:200].strip()):
        kept["license_name"] = short
    link = web_link(card.get("license_link"), repo)
    return kept | ({"license_link": link} if link else {})


def tags(value: Any) -> list[str]:
    return [text for text in _strings(value) if _SHAPES["tags"].fullmatch(text)]


def _strings(value: Any) -> list[str]:
    items: Iterable[Any] = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return []
    return [item for item in items if isinstance(item, str)][:_MOST_WORDS]
