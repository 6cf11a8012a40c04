"""The five plots of a report, as pictures. Each answers one question, and is None where there is
nothing to draw.

    frontier      what each byte buys: KL over size, ours and theirs
    tensor_map    which tensor got which type
    bits_by_kind  which kinds of tensors got the bits
    domains       how KL differs by kind of text
    convergence   how the search came down
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from quantkit.errors import QuantkitError
from quantkit.evidence.report.axes import (
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axes,
    Log,
    Place,
    frame,
    place,
    tick_text,
)
from quantkit.evidence.report.measures import Measures
from quantkit.evidence.report.picture import (
    Area,
    Box,
    Disc,
    Item,
    Picture,
    Stroke,
    Words,
    shortened,
    text_width,
)
from quantkit.evidence.report.schema import (
    GIVEN,
    OURS,
    STOCK,
    UNIFORM,
    Report,
    Row,
    Tensor,
    TracePoint,
)
from quantkit.evidence.report.text import number
from quantkit.ggml.types import QuantType
from quantkit.sizes import size

_BLOCK = re.compile(r"blk\.(\d+)\.(.+?)(?:\.weight)?")
_MAX_CELLS = 20_000
_SMALL = 11.0
# From few bits to many; none is lost on white or on navy.
_RAMP = ("#f7c948", "#f28c4b", "#dc5b7b", "#9a5cc6", "#4c6fd6", "#2a9d8f")


def draw_all(report: Report, measures: Measures | None = None) -> dict[str, Picture]:
    """Every plot that the report has the data for, by name, in the order they are shown. `measures`
    is told of one that cannot be drawn.
    """
    draw: dict[str, Callable[[], Picture | None]] = {
        "frontier": lambda: frontier(report),
        "domains": lambda: domains(report),
    }
    for output, names in names_by_output(report):
        types = {t.name: t.qtype for t in output.tensors}
        draw[names["tensor-map"]] = partial(tensor_map, types)
        draw[names["bits-by-kind"]] = partial(bits_by_kind, output.tensors)
        draw[names["convergence"]] = partial(convergence, output.trace)
    take = (measures or Measures()).take
    found = {name: take(f"the plot {name}", make) for name, make in draw.items()}
    return {name: picture for name, picture in found.items() if picture is not None}


def names_by_output(report: Report) -> list[tuple[Row, dict[str, str]]]:
    """The names of the plots of every output; those of several outputs are numbered by size."""
    kinds = ("tensor-map", "bits-by-kind", "convergence")
    if len(report.outputs) == 1:
        return [(report.first, {kind: kind for kind in kinds})]
    return [
        (output, {kind: f"{kind}-{number}" for kind in kinds})
        for number, output in enumerate(report.outputs, 1)
    ]


def _mark(row: Row, x: float, y: float) -> Disc:
    title = f"{row.label}: {size(row.n_bytes)}, KL {number(row.kl.value)}"
    fill = {OURS: "accent", UNIFORM: "wash", GIVEN: "soft", STOCK: "card"}[row.kind]
    outline = "accent" if row.kind in (OURS, UNIFORM) else "soft"
    return Disc(x, y, 5 if row.kind == OURS else 4, fill, outline, title)


def _short(row: Row, is_family: bool) -> str:
    if row.kind == OURS:
        return f"ours, {row.bpw:.2f} bits" if is_family else "this file"
    if row.kind == UNIFORM:
        return f"uniform {row.name}"
    return shortened(row.short.removesuffix(".gguf"), _SMALL, 150)


def frontier(report: Report) -> Picture | None:
    """KL over size. Lower and further left is better; whiskers are 95 % intervals."""
    rows = [r for r in report.by_size if r.kl.value > 0 and math.isfinite(r.kl.value)]
    if len(rows) < 2:
        return None
    unit, name = (1e9, "GB") if rows[-1].n_bytes >= 1e9 else (1e6, "MB")
    sizes = [row.n_bytes / unit for row in rows]
    spread = (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    low = [max(row.kl.low or row.kl.value, row.kl.value / 3) for row in rows]
    high = [row.kl.high or row.kl.value for row in rows]
    axes = Axes(
        (min(sizes) - 0.15 * spread, max(sizes) + 0.15 * spread), Log.over([*low, *high], pad=0.12)
    )
    items = frame(axes, f"file size, {name}", "mean KL divergence, nats", lambda v: f"{v:g}")
    points = [(axes.x(s), axes.y(row.kl.value)) for s, row in zip(sizes, rows, strict=True)]
    stock = [p for p, row in zip(points, rows, strict=True) if row.kind == STOCK]
    if len(stock) > 1:
        items.append(Stroke(tuple(_staircase(stock)), "line", 1.5, dashed=True))
    ours = [p for p, row in zip(points, rows, strict=True) if row.kind == OURS]
    if len(ours) > 1:
        items.append(Stroke(tuple(ours), "accent", 1.5))
    for (x, _), least, most in zip(points, low, high, strict=True):
        items.append(Stroke(((x, axes.y(least)), (x, axes.y(most))), "soft", 1.0))
    marks = [_mark(row, x, y) for row, (x, y) in zip(rows, points, strict=True)]
    ours_last = sorted(zip(rows, marks, strict=True), key=lambda pair: pair[0].kind == OURS)
    items += [mark for _, mark in ours_last]
    labels = [
        Place(x, y, _short(row, len(report.outputs) > 1), _SMALL, row.kind == OURS)
        for row, (x, y) in sorted(zip(rows, points, strict=True), key=lambda z: z[0].kind != OURS)
    ]
    items += place(labels, (LEFT, TOP, WIDTH - RIGHT, axes.bottom))
    title = "KL divergence over file size: " + "; ".join(mark.title for mark in marks)
    return Picture(WIDTH, HEIGHT, title, tuple(items))


def _staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What the best of the points so far gives at each size; y grows downwards."""
    steps = [points[0]]
    for x, y in points[1:]:
        if y > steps[-1][1]:
            steps += [(x, steps[-1][1]), (x, y)]
    return [*steps, (points[-1][0], steps[-1][1])]


def domains(report: Report) -> Picture | None:
    """One line per domain with every file's KL on it."""
    names = list(report.first.domains)
    rows = [row for row in report.by_size if all(n in row.domains for n in names)]
    values = [row.domains[n].value for row in rows for n in names if row.domains[n].value > 0]
    if not names or len(values) < 2:
        return None
    scale = Log.over(values, pad=0.06)
    label = min(110.0, 14 + max(text_width(name, 12) for name in names))
    right, step, top = WIDTH - RIGHT - 6, 34, TOP + 18
    bottom = top + step * len(names)

    def x(value: float) -> float:
        return label + scale.share(value) * (right - label)

    items: list[Item] = []
    free = 0.0  # where the next tick's label may begin
    for tick in scale.ticks():
        items.append(Stroke(((x(tick), top - 6), (x(tick), bottom - 8)), "line"))
        half = text_width(tick_text(tick), _SMALL) / 2
        if x(tick) - half >= free:
            items.append(Words(x(tick), bottom + 8, tick_text(tick), _SMALL, "middle"))
            free = x(tick) + half + 4
    for i, name in enumerate(names):
        y = top + step * i + step / 2 - 6
        items.append(Stroke(((label, y), (right, y)), "line"))
        items.append(Words(label - 8, y + 4, shortened(name, 12, label - 12), 12, "end", "ink"))
        for row in sorted(rows, key=lambda row: row.kind == OURS):
            kl = row.domains[name].value
            if kl > 0:
                mark = _mark(row, x(kl), y)
                title = f"{row.label} on {name}: KL {number(kl)}"
                items.append(Disc(mark.x, mark.y, mark.radius, mark.fill, mark.outline, title))
    items.append(Words((label + right) / 2, bottom + 26, "mean KL divergence, nats", 12, "middle"))
    items += _legend_of_marks(rows, label, TOP + 2)
    title = f"KL divergence by kind of text, on {', '.join(names)}"
    return Picture(WIDTH, bottom + 36, title, tuple(items))


def _legend_of_marks(rows: Sequence[Row], x: float, y: float) -> list[Item]:
    names = {OURS: "this file", STOCK: "llama.cpp", UNIFORM: "ours, uniform", GIVEN: "given"}
    items: list[Item] = []
    for kind, name in names.items():
        row = next((row for row in rows if row.kind == kind), None)
        if row is not None:
            mark = _mark(row, x + 5, y)
            items.append(Disc(mark.x, mark.y, 4, mark.fill, mark.outline))
            items.append(Words(x + 14, y + 4, name, _SMALL))
            x += 30 + text_width(name, _SMALL)
    return items


def tensor_map(types: Mapping[str, str]) -> Picture | None:
    """The found types as a grid: one row per kind of tensor, one column per block."""
    if not types or len(types) > _MAX_CELLS:
        return None
    colours = colours_of(set(types.values()))
    kinds: dict[str, dict[int, str]] = {}
    single: list[str] = []
    for name in types:
        match = _BLOCK.fullmatch(name)
        if match:
            kinds.setdefault(match[2], {})[int(match[1])] = name
        else:
            single.append(name)
    n_blocks = 1 + max((block for row in kinds.values() for block in row), default=0)
    if n_blocks * (len(kinds) or 1) > _MAX_CELLS:
        return None
    labels = [*kinds, *(name.removesuffix(".weight") for name in single)]
    left = min(120.0, 16 + max(text_width(label, _SMALL) for label in labels))
    cell, height, top = (WIDTH - RIGHT - left) / n_blocks, 15.0, 24.0
    gap = 0.6 if cell < 6 else 1.2
    items: list[Item] = []
    for block in range(0, n_blocks, _column_step(n_blocks)):
        items.append(Words(left + (block + 0.5) * cell, 16, str(block), 10, "middle"))
    for i, (kind, blocks) in enumerate(kinds.items()):
        y = top + i * height
        items.append(
            Words(left - 7, y + 11, shortened(kind, _SMALL, left - 12), _SMALL, "end", "ink")
        )
        for block, name in blocks.items():
            title = f"{name}: {types[name]}"
            box = (left + block * cell, y, cell - gap, height - 1.2)
            items.append(Box(*box, colours[types[name]], min(2.5, cell / 4), title))
    at = top + len(kinds) * height + (6 if kinds else 0)
    for name in single:
        label = name.removesuffix(".weight")
        items.append(
            Words(left - 7, at + 11, shortened(label, _SMALL, left - 12), _SMALL, "end", "ink")
        )
        width = min(WIDTH - RIGHT - left, max(3 * cell, 40.0))
        title = f"{name}: {types[name]}"
        items.append(Box(left, at, width - gap, height - 1.2, colours[types[name]], 2.5, title))
        at += height
    legend, at = _legend_of_types(colours, at + 10)
    n = len(set(types.values()))
    title = f"The type of each of {len(types)} tensors: {n} types over {n_blocks} blocks"
    return Picture(WIDTH, at, title, (*items, *legend))


def _column_step(n_blocks: int) -> int:
    steps = (1, 2, 4, 5, 10, 20, 50, 100)
    return next((step for step in steps if n_blocks <= 16 * step), 1000)


def _legend_of_types(colours: Mapping[str, str], y: float) -> tuple[list[Item], float]:
    """Swatches in as many lines as they need, and where they end."""
    items: list[Item] = []
    x = 14.0
    for name, colour in colours.items():
        shown = shortened(name, _SMALL, 120)
        width = 32 + text_width(shown, _SMALL)
        if x + width > WIDTH - 4:
            x, y = 14.0, y + 18
        items.append(Box(x, y, 12, 12, colour, 3))
        items.append(Words(x + 17, y + 10, shown, _SMALL))
        x += width
    return items, y + 24


def colours_of(types: set[str]) -> dict[str, str]:
    """One colour a type, warm for few bits to cool for many."""
    ordered = sorted(types, key=lambda name: (_bits(name), name))
    last = max(1, len(ordered) - 1)
    return {name: _ramp(i / last) for i, name in enumerate(ordered)}


def _bits(name: str) -> float:
    try:
        return QuantType(name).bpw
    except QuantkitError:
        return 99.0  # a type that this version does not know


def _ramp(t: float) -> str:
    at = t * (len(_RAMP) - 1)
    i = min(int(at), len(_RAMP) - 2)
    parts = (
        round(int(a, 16) + (at - i) * (int(b, 16) - int(a, 16)))
        for a, b in ((_RAMP[i][k : k + 2], _RAMP[i + 1][k : k + 2]) for k in (1, 3, 5))
    )
    return "#" + "".join(f"{part:02x}" for part in parts)


def bits_by_kind(tensors: Sequence[Tensor]) -> Picture | None:
    """Bits per weight of every kind of tensor, and its share of the bytes."""
    kinds: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        match = _BLOCK.fullmatch(tensor.name)
        kinds.setdefault(match[2] if match else tensor.name.removesuffix(".weight"), []).append(
            tensor
        )
    total = sum(tensor.n_bytes for tensor in tensors)
    if not kinds or not total or len(kinds) > 60:
        return None
    means = {
        kind: 8 * sum(t.n_bytes for t in group) / max(1, sum(t.n_elements for t in group))
        for kind, group in kinds.items()
    }
    left = min(120.0, 16 + max(text_width(kind, _SMALL) for kind in kinds))
    right, height, top = WIDTH - 140, 20.0, 12.0
    most = max(means.values())
    items: list[Item] = []
    for i, (kind, group) in enumerate(kinds.items()):
        y = top + i * height
        share = sum(t.n_bytes for t in group) / total
        width = means[kind] / most * (right - left)
        shown = shortened(kind, _SMALL, left - 12)
        items.append(Words(left - 7, y + 11, shown, _SMALL, "end", "ink"))
        items.append(Box(left, y, width, 13, "accent", 3, f"{kind}: {means[kind]:.2f} bits"))
        items.append(Words(left + width + 6, y + 11, f"{means[kind]:.2f}", _SMALL, colour="ink"))
        items.append(Words(WIDTH - RIGHT, y + 11, f"{100 * share:.1f} % of bytes", _SMALL, "end"))
    y = top + len(kinds) * height + 14
    items.append(Words((left + right) / 2, y, "bits per weight", 12, "middle"))
    title = "Bits per weight: " + ", ".join(f"{k} {v:.2f}" for k, v in means.items())
    return Picture(WIDTH, y + 12, title, tuple(items))


def convergence(points: Sequence[TracePoint]) -> Picture | None:
    """The KL that decides (expected after tuning where files are tuned), the best so far over the
    tokens spent, with its standard error as a band.
    """
    points = [p for p in points if p.kl > 0 and math.isfinite(p.kl)]
    if len(points) < 2:
        return None
    step = max(1, len(points) // 300)
    points = [*points[:-1:step], points[-1]]
    high = [p.kl + p.stderr for p in points]
    low = [max(p.kl - p.stderr, p.kl / 3) for p in points]
    tokens = [float(p.tokens) for p in points]
    axes = Axes((min(tokens), max(tokens)), Log.over([*high, *low], pad=0.08))
    items = frame(axes, "tokens evaluated by the search", "deciding KL, best so far, nats", _tokens)
    xs = [axes.x(t) for t in tokens]
    band = [(x, axes.y(v)) for x, v in zip(xs, high, strict=True)]
    band += [(x, axes.y(v)) for x, v in zip(xs, low, strict=True)][::-1]
    line = tuple((x, axes.y(p.kl)) for x, p in zip(xs, points, strict=True))
    items += [Area(tuple(band), "accent", 0.16), Stroke(_steps(line), "accent", 2.2)]
    items.append(Disc(*line[-1], 3.5, "accent", "accent"))
    title = f"KL divergence falls from {number(points[0].kl)} to {number(points[-1].kl)}"
    return Picture(WIDTH, HEIGHT, title, tuple(items))


def _steps(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The best known stays until a better one is found."""
    steps = [points[0]]
    for (_, y0), (x1, y1) in pairwise(points):
        steps += [(x1, y0), (x1, y1)]
    return tuple(steps)


def _tokens(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"
