"""A `Picture` as SVG: alone in a file that follows the reader's light or dark, or inside a page
whose own colours it takes.
"""

from __future__ import annotations

from html import escape

from quantkit.evidence.report.picture import (
    ROLES,
    THEMES,
    Area,
    Box,
    Disc,
    Item,
    Picture,
    Stroke,
    Words,
)

_FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif"
_MAX_WIDTH = 600  # pixels on a large screen: wider would only make the words huge


def standalone(picture: Picture) -> str:
    """A file of its own. Colours are attributes, so that every viewer shows the light picture; a
    style turns them for those who prefer dark.
    """
    dark = THEMES["dark"]
    rules = "".join(f".f-{r}{{fill:{dark[r]}}}.s-{r}{{stroke:{dark[r]}}}" for r in ROLES)
    style = f"<style>@media(prefers-color-scheme:dark){{{rules}}}</style>"
    back = _item(Box(0, 0, picture.width, picture.height, "card", 10), inline=False)
    body = "".join(_item(item, inline=False) for item in picture.items)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture.width:g}'
        f' {picture.height:g}" width="{1.5 * picture.width:g}" height="{1.5 * picture.height:g}"'
        f' font-family="{_FONT}" role="img">'
    )
    return f"{head}<title>{escape(picture.title)}</title>{style}{back}{body}</svg>\n"


def inline(picture: Picture) -> str:
    """For a page: as wide as there is room, colours from the page's `--qk-` variables."""
    body = "".join(_item(item, inline=True) for item in picture.items)
    return (
        f'<svg class="qk-chart" viewBox="0 0 {picture.width:g} {picture.height:g}" role="img"'
        f' aria-label="{escape(picture.title)}" style="max-width:{_MAX_WIDTH}px">{body}</svg>'
    )


def _item(item: Item, inline: bool) -> str:
    if isinstance(item, Stroke):
        dashes = ' stroke-dasharray="4 4"' if item.dashed else ""
        return (
            f'<polyline points="{_points(item.points)}" {_paint("stroke", item.colour, inline)}'
            f' stroke-width="{item.width:g}" stroke-linejoin="round"{dashes} fill="none"/>'
        )
    if isinstance(item, Area):
        paint = _paint("fill", item.fill, inline)
        opacity = f' fill-opacity="{item.opacity:g}"' if item.opacity < 1 else ""
        return f'<polygon points="{_points(item.points)}" {paint}{opacity}/>'
    if isinstance(item, Box):
        radius = f' rx="{item.radius:g}"' if item.radius else ""
        return (
            f'<rect x="{item.x:.6g}" y="{item.y:.6g}" width="{item.width:.6g}"'
            f' height="{item.height:.6g}"{radius} {_paint("fill", item.fill, inline)}'
            + _titled(item.title, "rect")
        )
    if isinstance(item, Disc):
        paint = _paints(item.fill, item.outline, inline)
        place = f'cx="{item.x:.6g}" cy="{item.y:.6g}" r="{item.radius:g}"'
        return f'<circle {place} {paint} stroke-width="2"' + _titled(item.title, "circle")
    return _words(item, inline)


def _words(item: Words, inline: bool) -> str:
    anchor = "" if item.anchor == "start" else f' text-anchor="{item.anchor}"'
    # A page's own rules for text in charts are weaker than a style, so all of it is said here.
    weight = 600 if item.bold else 400
    if inline:
        paint = (
            f'style="fill:{_variable(item.colour)};font-size:{item.size:g}px;font-weight:{weight}"'
        )
    else:
        size = f'font-size="{item.size:g}" font-weight="{weight}"'
        paint = f"{_paint('fill', item.colour, inline)} {size}"
    text = escape(item.text)
    return f'<text x="{item.x:.6g}" y="{item.y:.6g}"{anchor} {paint}>{text}</text>'


def _paint(what: str, colour: str, inline: bool) -> str:
    if colour not in ROLES:
        return f'{what}="{colour}"'
    if inline:
        return f'style="{what}:{_variable(colour)}"'
    return f'{what}="{THEMES["light"][colour]}" class="{what[0]}-{colour}"'


def _paints(fill: str, stroke: str, inline: bool) -> str:
    """Fill and outline together: an element has one style and one class."""
    if inline:
        return f'style="fill:{_variable(fill)};stroke:{_variable(stroke)}"'
    light = THEMES["light"]
    names = [f"f-{fill}"] * (fill in ROLES) + [f"s-{stroke}"] * (stroke in ROLES)
    paint = f'fill="{light.get(fill, fill)}" stroke="{light.get(stroke, stroke)}"'
    return f'{paint} class="{" ".join(names)}"' if names else paint


def _variable(colour: str) -> str:
    return f"var(--qk-{colour},{THEMES['light'][colour]})" if colour in ROLES else colour


def _points(points: tuple[tuple[float, float], ...]) -> str:
    return " ".join(f"{x:.6g},{y:.6g}" for x, y in points)


def _titled(title: str, tag: str) -> str:
    return f"><title>{escape(title)}</title></{tag}>" if title else "/>"
