"""A `Picture` as PNG, for places that show no SVG: drawn four times as large with Pillow and its
own font, then made smaller, which smooths every edge.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from quantkit.evidence.report.picture import THEMES, Area, Box, Disc, Picture, Stroke, Words

_SHOWN = 2  # pixels of the file to one of the picture
_OVER = 2  # and of the drawing to one of the file
_SCALE = _SHOWN * _OVER
_DASH = 4.0


def png(picture: Picture, theme: str = "light") -> bytes:
    """The picture on an opaque card, so that it reads well on any page. `theme` is light or dark.

    Text that Pillow's font has no letters for is drawn as boxes; the SVG beside it has it right.
    """
    colours = THEMES[theme]
    size = (round(_SCALE * picture.width), round(_SCALE * picture.height))
    image = Image.new("RGBA", size, colours["card"])
    for item in picture.items:
        draw = ImageDraw.Draw(image)
        if isinstance(item, Stroke):
            _stroke(draw, item, colours)
        elif isinstance(item, Box):
            corners = _scaled((item.x, item.y), (item.x + item.width, item.y + item.height))
            (left, top), (right, bottom) = corners
            if right - left < 1 or bottom - top < 1:
                continue
            box = (left, top, right - 1, bottom - 1)
            draw.rounded_rectangle(box, _SCALE * item.radius, fill=_colour(item.fill, colours))
        elif isinstance(item, Disc):
            _disc(draw, item, colours)
        elif isinstance(item, Words):
            _words(draw, item, colours)
        else:
            image = _with_area(image, item, colours)
    small = image.convert("RGB").resize(
        (round(_SHOWN * picture.width), round(_SHOWN * picture.height)), Image.Resampling.LANCZOS
    )
    file = io.BytesIO()
    small.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()


def _colour(colour: str, colours: dict[str, str]) -> str:
    return colours.get(colour, colour)


def _scaled(*points: tuple[float, float]) -> list[tuple[float, float]]:
    return [(_SCALE * x, _SCALE * y) for x, y in points]


def _stroke(draw: ImageDraw.ImageDraw, item: Stroke, colours: dict[str, str]) -> None:
    width, fill = round(_SCALE * item.width), _colour(item.colour, colours)
    if not item.dashed:
        draw.line(_scaled(*item.points), fill, width, joint="curve")
        return
    for (x0, y0), (x1, y1) in zip(item.points, item.points[1:], strict=False):
        length = max(1e-9, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
        at = 0.0
        while at < length:
            a, b = at / length, min(length, at + _DASH) / length
            ends = [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (a, b)]
            draw.line(_scaled(*ends), fill, width)
            at += 2 * _DASH


def _disc(draw: ImageDraw.ImageDraw, item: Disc, colours: dict[str, str]) -> None:
    x, y, radius = _SCALE * item.x, _SCALE * item.y, _SCALE * (item.radius + 1)
    box = (x - radius, y - radius, x + radius, y + radius)
    fill, outline = _colour(item.fill, colours), _colour(item.outline, colours)
    draw.ellipse(box, fill=fill, outline=outline, width=2 * _SCALE)


def _words(draw: ImageDraw.ImageDraw, item: Words, colours: dict[str, str]) -> None:
    fill = _colour(item.colour, colours)
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[item.anchor]
    # The font comes in one weight; an outline in its own colour makes it bolder.
    weight = round(0.03 * _SCALE * item.size) if item.bold else 0
    place = (_SCALE * item.x, _SCALE * item.y)
    font = _font(round(_SCALE * item.size))
    draw.text(place, item.text, fill, font, anchor=anchor, stroke_width=weight, stroke_fill=fill)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _with_area(image: Image.Image, item: Area, colours: dict[str, str]) -> Image.Image:
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    red, green, blue = (int(_colour(item.fill, colours)[i : i + 2], 16) for i in (1, 3, 5))
    fill = (red, green, blue, round(255 * item.opacity))
    ImageDraw.Draw(layer).polygon(_scaled(*item.points), fill)
    return Image.alpha_composite(image, layer)
