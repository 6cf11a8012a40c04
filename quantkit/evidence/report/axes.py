"""Scales, frames and places for labels: what the plots have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.evidence.report.picture import Item, Stroke, Words, text_width
from quantkit.evidence.report.text import number

WIDTH, HEIGHT = 400.0, 280.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 12.0, 26.0, 42.0


@dataclass(frozen=True)
class Log:
    """A logarithmic scale from `low` to `high`, both powers of ten."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float], pad: float) -> Log:
        """Wide enough for all values, with `pad` of its length left at both ends."""
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.03, pad * (high - low))
        return cls(low - room, high + room)

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        return (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of every decade; fewer where that is many, even steps where it is few."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for digits in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
            ticks = [m * 10.0**d for d in decades for m in digits]
            ticks = [t for t in ticks if self.low <= math.log10(t) <= self.high]
            if 3 <= len(ticks) <= 7:
                return ticks
        step = (self.high - self.low) / 4
        return [10 ** (self.low + i * step) for i in range(5)]


@dataclass(frozen=True)
class Axes:
    """A plot's frame: x linear, y logarithmic."""

    x_range: tuple[float, float]
    y_scale: Log

    @property
    def bottom(self) -> float:
        return HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        low, high = self._x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.bottom - self.y_scale.share(value) * (self.bottom - TOP)

    @property
    def _x_range(self) -> tuple[float, float]:
        low, high = self.x_range
        return (low, high) if high > low else (low * 0.9, high * 1.1 + 1e-9)

    def x_ticks(self) -> list[float]:
        low, high = self._x_range
        step = _round_step((high - low) / 5)
        return [i * step for i in range(math.ceil(low / step), int(high / step) + 1)]


def tick_text(value: float) -> str:
    """A tick of a KL axis: 0.05, not 0.0500."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def frame(axes: Axes, x_label: str, y_label: str, x_text: Callable[[float], str]) -> list[Item]:
    """Grid lines, tick labels, and what the axes show."""
    items: list[Item] = []
    for tick in axes.y_scale.ticks():
        y = axes.y(tick)
        items.append(Stroke(((LEFT, y), (WIDTH - RIGHT, y)), "line"))
        items.append(Words(LEFT - 7, y + 4, tick_text(tick), 11, "end"))
    for tick in axes.x_ticks():
        items.append(Words(axes.x(tick), axes.bottom + 17, x_text(round(tick, 9)), 11, "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    items.append(Words(middle, HEIGHT - 8, x_label, 12, "middle"))
    items.append(Words(8, 15, y_label, 12))
    return items


@dataclass(frozen=True)
class Place:
    """A label that wants to stand beside the point x, y."""

    x: float
    y: float
    text: str
    size: float
    is_ours: bool


def place(labels: Sequence[Place], inside: tuple[float, float, float, float]) -> list[Words]:
    """Each label at the first of eight places around its point where it covers no other label and
    no point; where all are taken, at the one that covers least. `inside` is left, top, right,
    bottom.
    """
    points = [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in labels]
    taken: list[tuple[float, float, float, float]] = []
    words = []
    for label in labels:
        width = text_width(label.text, label.size) * (1.08 if label.is_ours else 1.0)
        options: list[tuple[float, int, Words, tuple[float, float, float, float]]] = []
        for dx, dy, anchor in _AROUND:
            left = label.x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            y = label.y + dy
            box = (left, y - label.size, left + width, y + 2)
            own = (label.x - 6, label.y - 6, label.x + 6, label.y + 6)
            others = [*taken, *(point for point in points if point != own)]
            cost = sum(_overlap(box, other) for other in others) + 5 * _outside(box, inside)
            options.append((cost, len(options), Words(label.x + dx, y, "", anchor=anchor), box))
        _, _, at, box = min(options, key=lambda option: option[:2])
        taken.append(box)
        colour = "accent" if label.is_ours else "soft"
        words.append(
            Words(at.x, at.y, label.text, label.size, at.anchor, colour, bold=label.is_ours)
        )
    return words


_AROUND = (
    (0, -10, "middle"),
    (10, 4, "start"),
    (0, 19, "middle"),
    (-10, 4, "end"),
    (8, -8, "start"),
    (8, 16, "start"),
    (-8, -8, "end"),
    (-8, 16, "end"),
)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(
    a: tuple[float, float, float, float], inside: tuple[float, float, float, float]
) -> float:
    beyond = (inside[0] - a[0], inside[1] - a[1], a[2] - inside[2], a[3] - inside[3])
    return sum(max(0.0, n) for n in beyond) * 10
