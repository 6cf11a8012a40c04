"""Pictures as inline SVG: pure functions, colours from the page's own variables, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from quantkit.launch import KlPoint

_W, _H = 640, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 16, 50


class _Axes:
    """A plot's frame: x linear, y logarithmic, both with round ticks."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.x0, self.x1 = min(xs), max(xs)
        if self.x1 <= self.x0:
            self.x0, self.x1 = self.x0 * 0.9, self.x1 * 1.1 + 1e-9
        low, high = math.log10(min(ys)), math.log10(max(ys))
        pad = max(0.04, 0.08 * (high - low))
        self.y0, self.y1 = low - pad, high + pad

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_W - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.y0) / (self.y1 - self.y0)
        return _H - _BOTTOM - share * (_H - _TOP - _BOTTOM)

    def y_ticks(self) -> list[float]:
        """1, 2 and 5 of every decade; where that gives too few, five even steps."""
        decades = range(math.floor(self.y0), math.ceil(self.y1) + 1)
        ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        ticks = [t for t in ticks if self.y0 <= math.log10(t) <= self.y1]
        if len(ticks) > 6:
            ticks = [t for t in ticks if _mantissa(t) == 1] or ticks[::3]
        if len(ticks) < 3:
            step = (self.y1 - self.y0) / 4
            ticks = [10 ** (self.y0 + i * step) for i in range(5)]
        return ticks

    def x_ticks(self) -> list[float]:
        step = _round_step((self.x1 - self.x0) / 5)
        first = math.ceil(self.x0 / step)
        return [i * step for i in range(first, int(self.x1 / step) + 1)]


def _mantissa(value: float) -> int:
    return round(value / 10 ** math.floor(math.log10(value) + 1e-9))


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def kl_text(value: float) -> str:
    """A KL divergence with three digits that count."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, min(7, 2 - math.floor(math.log10(value))))}f}"


def kl_with_error(value: float, stderr: float) -> str:
    """Both with the digits that count of the value."""
    text = kl_text(value)
    n_decimals = len(text.partition(".")[2])
    return f"{text} ± {stderr:.{n_decimals}f}"


def _frame(axes: _Axes, x_label: str, x_text: Any, label: str) -> list[str]:
    parts = [
        f'<svg class="qk-chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(label)}">'
    ]
    for tick in axes.y_ticks():
        y = axes.y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{kl_text(tick)}</text>'
        )
    for tick in axes.x_ticks():
        x = axes.x(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{_H - _BOTTOM + 20}" text-anchor="middle">{x_text(tick)}</text>'
        )
    middle = (_LEFT + _W - _RIGHT) / 2
    place = f'x="{middle}" y="{_H - 4}" text-anchor="middle"'
    parts.append(f'<text class="axis" {place}>{escape(x_label)}</text>')
    return parts


def _tokens(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def kl_curve(points: Sequence[KlPoint]) -> str:
    """The best KL known so far over the tokens spent, with its standard error as a band."""
    points = [p for p in points if p.kl > 0 and math.isfinite(p.kl)]
    if len(points) < 2:
        return ""
    step = max(1, len(points) // 300)
    points = [*points[:-1:step], points[-1]]
    high = [p.kl + p.stderr for p in points]
    low = [max(p.kl - p.stderr, p.kl / 3) for p in points]
    axes = _Axes([p.tokens for p in points], [*high, *low])
    last = points[-1]
    label = f"KL divergence falls from {kl_text(points[0].kl)} to {kl_text(last.kl)}"
    parts = _frame(axes, "tokens evaluated by the search", _tokens, label)
    xs = [axes.x(p.tokens) for p in points]
    band = [f"{x:.1f},{axes.y(v):.1f}" for x, v in zip(xs, high, strict=True)]
    band += [f"{x:.1f},{axes.y(v):.1f}" for x, v in list(zip(xs, low, strict=True))[::-1]]
    line = " ".join(f"{x:.1f},{axes.y(p.kl):.1f}" for x, p in zip(xs, points, strict=True))
    parts.append(f'<polygon class="band" points="{" ".join(band)}"/>')
    parts.append(f'<polyline class="line" points="{line}"/>')
    parts.append(f'<circle class="ours" cx="{xs[-1]:.1f}" cy="{axes.y(last.kl):.1f}" r="4"/>')
    return "".join(parts) + "</svg>"


def frontier(report: dict[str, Any]) -> str:
    """KL over size: our file against llama.cpp's own around it. Lower and further left is
    better.
    """
    rows = [(r["n_bytes"], r["kl"]["mean"], "", True) for r in report["outputs"]]
    rows += [(r["n_bytes"], r["kl"]["mean"], str(r["name"]), False) for r in report["baselines"]]
    rows = [row for row in rows if row[1] > 0 and math.isfinite(row[1])]
    if len(rows) < 2:
        return ""
    unit, name = (1e9, "GB") if max(row[0] for row in rows) >= 1e9 else (1e6, "MB")
    sizes = [row[0] / unit for row in rows]
    margin = 0.12 * (max(sizes) - min(sizes))
    axes = _Axes([min(sizes) - margin, max(sizes) + margin], [row[1] for row in rows])
    label = "KL divergence over file size: this file and llama.cpp's own mixes"
    parts = _frame(axes, f"file size, {name}", lambda v: f"{v:g}", label)
    taken: list[tuple[float, float]] = []
    for n_bytes, kl, text, ours in sorted(rows, key=lambda row: row[0]):
        x, y = axes.x(n_bytes / unit), axes.y(kl)
        parts.append(
            f'<circle class="{"ours" if ours else "stock"}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        )
        text_y = y - 10 if y > _TOP + 16 else y + 20
        while any(abs(x - a) < 70 and abs(text_y - b) < 13 for a, b in taken):
            text_y += 13
        taken.append((x, text_y))
        shown = "this file" if ours else escape(text.removesuffix(" --pure")[:24])
        shown += " pure" if text.endswith(" --pure") else ""
        kind = "label ours-label" if ours else "label"
        anchor = "end" if x > _W - 80 else "start" if x < _LEFT + 40 else "middle"
        place = f'x="{x:.1f}" y="{text_y:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="{kind}" {place}>{shown}</text>')
    return "".join(parts) + "</svg>"
