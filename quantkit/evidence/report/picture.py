"""A drawing as data: lines, boxes, discs, areas and words. `svg` and `png` turn it into files.

Plots are pure functions that return a `Picture`; none of them knows how it will be shown. A colour
is the name of a role (`ink`, `soft`, `line`, `card`, `wash`, `accent`), which is another colour on
dark than on light, or a fixed `#rrggbb`. Coordinates are pixels of a picture as wide as a phone;
large screens show it larger.
"""

from __future__ import annotations

from dataclasses import dataclass

THEMES = {
    "light": {
        "ink": "#1e293b",
        "soft": "#5b6779",
        "line": "#dfe5ec",
        "card": "#ffffff",
        "wash": "#f1f5f9",
        "accent": "#4f46e5",
    },
    "dark": {
        "ink": "#e5e9f0",
        "soft": "#9aa7b8",
        "line": "#2b3648",
        "card": "#131c2e",
        "wash": "#1c2739",
        "accent": "#a5b4fc",
    },
}
ROLES = tuple(THEMES["light"])


@dataclass(frozen=True)
class Stroke:
    """A line through `points`; dashed on demand."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: tuple[tuple[float, float], ...]
    fill: str
    opacity: float = 1.0


@dataclass(frozen=True)
class Box:
    """A filled rectangle. `title` is shown when one points at it."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    radius: float = 0.0
    title: str = ""


@dataclass(frozen=True)
class Disc:
    """A filled circle with an outline."""

    x: float
    y: float
    radius: float
    fill: str
    outline: str
    title: str = ""


@dataclass(frozen=True)
class Words:
    """One line of text; `y` is its base line, `anchor` start, middle or end."""

    x: float
    y: float
    text: str
    size: float = 12.0
    anchor: str = "start"
    colour: str = "soft"
    bold: bool = False


Item = Stroke | Area | Box | Disc | Words


@dataclass(frozen=True)
class Picture:
    """What is drawn, back to front, and `title`: what it shows, for those who cannot see it."""

    width: float
    height: float
    title: str
    items: tuple[Item, ...]


def text_width(text: str, size: float) -> float:
    """About the width of a line of text, without asking a font."""
    narrow = sum(character in "iljtfrI.,:;|()' -" for character in text)
    return size * (0.58 * len(text) - 0.24 * narrow)


def shortened(text: str, size: float, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width`."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"
