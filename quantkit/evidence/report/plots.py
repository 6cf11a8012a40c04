"""The five plots of a report as Vega-Lite specifications: pure functions of what was measured. Each
answers one question, and is None where there is nothing to draw.

    frontier      what each byte buys: KL over size, ours and theirs
    domains       how KL differs by kind of text
    tensor_map    which tensor got which type
    bits_by_kind  which kinds of tensors got the bits
    convergence   how the search came down

The last three take files by name; of several, a page shows the one that is chosen there. Colors are
those of the light theme: `render` and the page's style sheet turn them dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evidence.report.measures import Measures
from quantkit.evidence.report.render import COLORS, FONT, Spec
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

Datum = dict[str, Any]  # what one mark is drawn from; "about" is told when one points at it

_WIDTH, _HEIGHT = 400, 260  # pixels; a page gives what width it has
_LINE = 14  # pixels from one label of the frontier to the next
_MAX_CELLS = 20_000
_BLOCK = re.compile(r"blk\.(\d+)\.(.+?)(?:\.weight)?")
# From few bits to many; none is lost on white or on navy.
_RAMP = ("#f7c948", "#f28c4b", "#dc5b7b", "#9a5cc6", "#4c6fd6", "#2a9d8f")
_INK, _SOFT, _FAINT, _ACCENT = (COLORS[role] for role in ("ink", "soft", "line", "accent"))
# What a kind of row is called, and the fill and outline of its points; the shapes of several ours.
_KINDS = {
    OURS: ("ours", _ACCENT, _ACCENT),
    STOCK: ("llama.cpp", COLORS["card"], _SOFT),
    UNIFORM: ("ours, uniform", COLORS["wash"], _ACCENT),
    GIVEN: ("given", _SOFT, _SOFT),
}
_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "triangle-right")
_TOLD = {"tooltip": {"field": "about"}, "description": {"field": "about"}}
_CONFIG = {
    "font": FONT,
    "view": {"stroke": None},
    "scale": {"bandPaddingInner": 0.1, "rectBandPaddingInner": 0.1},
    "axis": {
        **{"aria": False, "domain": False, "ticks": False, "gridColor": _FAINT, "labelPadding": 5},
        **{"labelColor": _SOFT, "labelFontSize": 11},
        **{"titleColor": _SOFT, "titleFontSize": 12, "titleFontWeight": "normal"},
    },
    "legend": {
        **{"aria": False, "title": None, "columns": 2},  # more would be cut on the smallest phones
        **{"labelColor": _SOFT, "labelFontSize": 11, "labelLimit": 80},
    },
    "point": {"size": 55, "strokeWidth": 2, "opacity": 1},
    "text": {"align": "left", "baseline": "middle", "fontSize": 11, "color": _SOFT},
}


def draw_all(
    report: Report, measures: Measures | None = None, together: bool = False
) -> dict[str, Spec]:
    """Return every plot that the report has the data for, by name, in the order they are shown.
    What there is of every output is a plot each, or with `together` one that lets a reader choose.
    `measures` records a plot that cannot be drawn.
    """
    take = (measures or Measures()).take
    plots = {"frontier": partial(frontier, report), "domains": partial(domains, report)}
    for files in [report.outputs] if together else [(output,) for output in report.outputs]:
        types = {row.name: {n: t.qtype for n, t in (row.tensors or {}).items()} for row in files}
        drawn = {
            "tensor-map": partial(tensor_map, types),
            "bits-by-kind": partial(bits_by_kind, {row.name: row.tensors or {} for row in files}),
            "convergence": partial(convergence, {row.name: row.trace or () for row in files}),
        }
        plots |= {k if together else report.numbered(k, files[0]): v for k, v in drawn.items()}
    found = {name: take(f"the plot {name}", make) for name, make in plots.items()}
    return {name: plot for name, plot in found.items() if plot is not None}


def _plot(about: str, height: int, data: Sequence[Datum], encoding: Spec, *layers: Spec) -> Spec:
    """One plot of layers that share data, encoding and looks. Of several files one is shown."""
    plot: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "description": about,
        "width": _WIDTH,
        "height": height,
        "padding": 10,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": COLORS["card"],
        "config": _CONFIG,
        # A page recolors the elements of an SVG; a canvas has none.
        "usermeta": {"embedOptions": {"renderer": "svg", "actions": False}},
        "data": {"values": list(data)},
        "encoding": encoding,
        "layer": list(layers),
    }
    files = list(dict.fromkeys(datum["file"] for datum in data if "file" in datum))
    if len(files) > 1:
        choice = {"input": "select", "options": files, "name": "File "}
        plot["params"] = [{"name": "chosen", "value": files[0], "bind": choice}]
        plot["transform"] = [{"filter": "datum.file == chosen"}]
    return plot


def _layer(mark: str, encoding: Spec | None = None, only: str = "", **looks: Any) -> Spec:
    """Marks of one type; `only` those for which an expression is true."""
    chosen = {"transform": [{"filter": only}]} if only else {}
    told = "description" in (encoding or {})
    return {**chosen, "mark": {"type": mark, "aria": told, **looks}, "encoding": encoding or {}}


def _number(field: str, title: str, scale: Spec, **axis: Any) -> Spec:
    shown = {"title": title, "tickCount": 5, "format": "~r", **axis}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": shown}


def _name(field: str, names: Iterable[str], **axis: Any) -> Spec:
    """A band for every name, in this order."""
    shown = {"title": None, "labelColor": _INK, "labelLimit": 110, "grid": False, **axis}
    domain = list(dict.fromkeys(names))
    return {"field": field, "type": "nominal", "scale": {"domain": domain}, "axis": shown}


def _log(data: Sequence[Datum], *fields: str) -> Spec:
    """A logarithmic scale over the fields, with room at both ends."""
    values = [math.log(datum[field]) for datum in data for field in fields]
    room = max(0.05, 0.06 * (max(values) - min(values)))
    ends = [math.exp(min(values) - room), math.exp(max(values) + room)]
    return {"type": "log", "domain": ends, "nice": False}


def _points(data: Sequence[Datum], legend: Spec | None) -> Spec:
    """A point for every row, its fill, outline and shape by the field `name`: files of ours have
    their own, the others that of their kind.
    """
    kinds = {datum["name"]: datum["kind"] for datum in data}
    looks = [
        (name, *colors, _SHAPES[i % len(_SHAPES)] if kind == OURS else _SHAPES[0])
        for kind, (_, *colors) in _KINDS.items()
        for i, name in enumerate(name for name, of in kinds.items() if of == kind)
    ]
    names, *ranges = zip(*looks, strict=True)
    name = {"field": "name", "type": "nominal", "legend": legend}
    fill, stroke, shape = ({**name, "scale": {"domain": names, "range": r}} for r in ranges)
    return _layer("point", {"fill": fill, "stroke": stroke, "shape": shape, **_TOLD})


def frontier(report: Report) -> Spec | None:
    """Plot KL over size. Lower and further left is better; whiskers are 95 % intervals.

    The labels stand in a column at the right, each level with its point or as near to that as the
    others let it: none can cover a point, a whisker or another label.
    """
    rows = [r for r in report.by_size if r.kl.value > 0 and math.isfinite(r.kl.value)]
    if len(rows) < 2:
        return None
    unit, name = (1e9, "GB") if rows[-1].n_bytes >= 1e9 else (1e6, "MB")
    labels = labels_of(report)
    data: list[Datum] = [
        {
            "about": f"{row.title}: {size(row.n_bytes)}, KL {number(row.kl.value)}",
            "label": labels.get(row.name) or _short(row),
            **_kind(row, labels),
            "size": row.n_bytes / unit,
            "kl": row.kl.value,
            "low": max((row.kl.ci95 or (row.kl.value,))[0], row.kl.value / 3),
            "high": (row.kl.ci95 or (row.kl.value,))[-1],
        }
        for row in sorted(rows, key=lambda row: row.kind == OURS)  # ours above the others
    ]
    best = math.inf
    for datum in data:  # stock files by size: whether one is the best so far
        if datum["kind"] == STOCK:
            datum["best"] = best = min(best, datum["kl"])
    height = max(_HEIGHT, round(1.1 * _LINE * len(data)))
    scale = _log(data, "low", "high")
    gap = math.log(scale["domain"][1] / scale["domain"][0]) * _LINE / height
    by_kl = sorted(data, key=lambda datum: datum["kl"])
    places = spread([math.log(datum["kl"]) for datum in by_kl], gap)
    for datum, place in zip(by_kl, places, strict=True):
        datum["place"] = math.exp(place)
    edge, beyond = {"value": "width"}, {"value": {"expr": "width + 14"}}
    ours = f"datum.kind == '{OURS}'"
    color = {"condition": {"test": ours, "value": _ACCENT}, "value": _SOFT}
    label = {"x": edge, "y": {"field": "place"}, "text": {"field": "label"}, "color": color}
    stairs = {"interpolate": "step-after", "strokeDash": [4, 4], "opacity": 0.5}
    loose = {"zero": False, "nice": False, "padding": 12}
    ticks = {"grid": False, "ticks": True, "tickColor": _FAINT}
    return _plot(
        "KL divergence over file size: " + "; ".join(datum["about"] for datum in data),
        height,
        data,
        {
            "x": _number("size", f"file size, {name}", loose, grid=False),
            "y": _number("kl", "mean KL divergence, nats", scale, **ticks),
        },
        _layer("rule", {"x2": edge}, color=_FAINT),
        _layer("rule", {"x": edge, "x2": beyond, "y2": {"field": "place"}}, color=_FAINT),
        _layer("line", {"y": {"field": "best"}}, "isValid(datum.best)", color=_SOFT, **stairs),
        _layer("line", only=ours, color=_ACCENT, strokeWidth=1.5),
        _layer("rule", {"y": {"field": "low"}, "y2": {"field": "high"}}, color=_SOFT),
        _points(data, None),
        _layer("text", label, dx=17, limit=130),
    )


def labels_of(report: Report) -> dict[str, str]:
    """Return what each of our files is called beside others, by its name: by what the name ends
    with, as "ours, Q4_K_M". One file alone is "this file".
    """
    ours = [row.name for row in report.outputs if row.kind == OURS]
    ends = {name: name.rpartition("-EVO-")[2].removesuffix(".gguf") for name in ours}
    return {name: f"ours, {ends[name]}" if len(ours) > 1 else "this file" for name in ours}


def _kind(row: Row, labels: Mapping[str, str]) -> Datum:
    """What a row is, and what a legend calls it."""
    own = labels[row.name] if row.kind == OURS and len(labels) > 1 else _KINDS[row.kind][0]
    return {"kind": row.kind, "name": own}


def _short(row: Row) -> str:
    return f"uniform {row.name}" if row.kind == UNIFORM else row.short.removesuffix(".gguf")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return ascending values, at least `gap` apart and moved as little as that takes: those that
    are too close stand evenly around their average.
    """
    groups: list[tuple[float, int]] = []  # values less the gaps before them: their mean, how many
    for i, value in enumerate(values):
        mean, n = value - i * gap, 1
        while groups and groups[-1][0] > mean:
            before, n_before = groups.pop()
            mean, n = (before * n_before + mean * n) / (n_before + n), n_before + n
        groups.append((mean, n))
    means = [mean for mean, n in groups for _ in range(n)]
    return [mean + i * gap for i, mean in enumerate(means)]


def domains(report: Report) -> Spec | None:
    """Plot one line per domain with every file's KL on it."""
    names = list(report.first.domains)
    rows = [row for row in report.by_size if all(n in row.domains for n in names)]
    labels = labels_of(report)
    data: list[Datum] = [
        {
            "about": f"{row.title} on {name}: KL {number(row.domains[name].kl.value)}",
            **_kind(row, labels),
            "domain": name,
            "kl": row.domains[name].kl.value,
        }
        for row in sorted(rows, key=lambda row: row.kind == OURS)
        for name in names
        if row.domains[name].kl.value > 0
    ]
    if len(data) < 2:
        return None
    return _plot(
        f"KL divergence by kind of text, on {', '.join(names)}",
        34 * len(names),
        data,
        {
            "x": _number("kl", "mean KL divergence, nats", _log(data, "kl")),
            "y": _name("domain", names, grid=True),
        },
        _points(data, {"orient": "top", "labelLimit": 115}),
    )


def _kind_and_block(tensor: str) -> tuple[str, int | None]:
    match = _BLOCK.fullmatch(tensor)
    return (match[2], int(match[1])) if match else (tensor.removesuffix(".weight"), None)


def tensor_map(files: Mapping[str, Mapping[str, str]]) -> Spec | None:
    """Plot the type of every tensor of each file as a grid: one row per kind of tensor, one column
    per block.
    """
    data: list[Datum] = []
    for file, types in files.items():
        for tensor, qtype in types.items():
            kind, block = _kind_and_block(tensor)
            told = {"about": f"{tensor}: {qtype}", "file": file}
            data.append({**told, "kind": kind, "block": block, "type": qtype})
    if not data or max(map(len, files.values())) > _MAX_CELLS:
        return None
    blocks = {datum["block"] for datum in data if datum["block"] is not None}
    names = [d["kind"] for d in sorted(data, key=lambda datum: datum["block"] is None)]
    colors = colors_of({datum["type"] for datum in data})
    color = {
        "field": "type",
        "type": "nominal",
        "scale": {"domain": list(colors), "range": list(colors.values())},
        "legend": {"orient": "bottom", "symbolType": "square"},
    }
    axis = {"title": None, "orient": "top", "labelAngle": 0, "grid": False}
    axis |= {"labelOverlap": "parity", "labelSeparation": 4}
    x = {"field": "block", "type": "ordinal", "axis": axis}
    alone = {"x": {"value": 0}, "x2": {"value": 40}, **_TOLD}
    layers = [
        *([_layer("rect", {"x": x, **_TOLD}, "isValid(datum.block)")] if blocks else []),
        _layer("rect", alone, "!isValid(datum.block)"),
    ]
    return _plot(
        f"The type of each of {len(data)} tensors: {len(colors)} types over {len(blocks)} blocks",
        16 * len(set(names)),
        data,
        {"y": _name("kind", names), "color": color},
        *layers,
    )


def colors_of(types: set[str]) -> dict[str, str]:
    """Return one color a type, warm for few bits to cool for many."""
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


def bits_by_kind(files: Mapping[str, Mapping[str, Tensor]]) -> Spec | None:
    """Plot the bits per weight of every kind of tensor of each file, and its share of the file's
    bytes.
    """
    data: list[Datum] = []
    for file, tensors in files.items():
        kinds: dict[str, list[Tensor]] = {}
        for name, tensor in tensors.items():
            kinds.setdefault(_kind_and_block(name)[0], []).append(tensor)
        total = sum(tensor.n_bytes for tensor in tensors.values())
        if not total or len(kinds) > 60:
            return None
        for kind, group in kinds.items():
            n_bytes = sum(tensor.n_bytes for tensor in group)
            bits = 8 * n_bytes / max(1, sum(tensor.n_elements for tensor in group))
            told = {"about": f"{kind}: {bits:.2f} bits", "file": file}
            share = f"{100 * n_bytes / total:.1f} % of bytes"
            data.append({**told, "kind": kind, "bits": bits, "share": share})
    if not data:
        return None
    scale = {"domain": [0, 1.2 * max(datum["bits"] for datum in data)], "nice": False}
    value = {"text": {"field": "bits", "format": ".2f"}, "color": {"value": _INK}}
    first = [datum for datum in data if datum["file"] == data[0]["file"]]
    return _plot(
        "Bits per weight: " + ", ".join(f"{d['kind']} {d['bits']:.2f}" for d in first),
        20 * len({datum["kind"] for datum in data}),
        data,
        {
            "x": _number("bits", "bits per weight", scale, grid=False, labels=False),
            "y": _name("kind", [datum["kind"] for datum in data]),
        },
        _layer("bar", _TOLD, color=_ACCENT, height=14),
        _layer("text", value, dx=5),
        _layer("text", {"x": {"value": "width"}, "text": {"field": "share"}}, dx=5),
    )


def convergence(files: Mapping[str, Sequence[TracePoint]]) -> Spec | None:
    """Plot the best KL so far (the one expected after tuning if files are tuned) over the tokens
    spent, with its standard error as a band.
    """
    data: list[Datum] = []
    for file, trace in files.items():
        known = [p for p in trace if p.kl > 0 and math.isfinite(p.kl)]
        step = max(1, len(known) // 300)
        data += [
            {
                "about": f"KL {number(point.kl)} after {point.tokens:,} tokens",
                "file": file,
                "tokens": point.tokens,
                "kl": point.kl,
                "low": max(point.kl - point.stderr, point.kl / 3),
                "high": point.kl + point.stderr,
                "last": point is known[-1],
            }
            for point in [*known[:-1:step], *known[-1:]]
            if len(known) > 1
        ]
    if not data:
        return None
    band = {"y": {"field": "low"}, "y2": {"field": "high"}}
    tight = {"zero": False, "nice": False}
    brief = {"grid": False, "labelExpr": "format(datum.value, '~s')"}
    steps: Spec = {"interpolate": "step-after", "color": _ACCENT}
    solid: Spec = {"filled": True, "color": _ACCENT}
    last = next(datum for datum in data if datum["last"])
    return _plot(
        f"KL divergence falls from {number(data[0]['kl'])} to {number(last['kl'])}",
        _HEIGHT,
        data,
        {
            "x": _number("tokens", "tokens evaluated by the search", tight, **brief),
            "y": _number("kl", "best KL so far, nats", _log(data, "low", "high")),
        },
        _layer("area", band, opacity=0.16, **steps),
        _layer("line", strokeWidth=2.2, **steps),
        _layer("point", _TOLD, size=60, opacity=0, **solid),
        _layer("point", only="datum.last", size=40, opacity=1, **solid),
    )
