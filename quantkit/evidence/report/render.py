"""Plots as SVG and PNG files, by the Vega that vl-convert carries: no browser, no network, and the
same bytes for the same plot.
"""

from __future__ import annotations

import io
import os
from typing import Any
from xml.etree import ElementTree

Spec = dict[str, Any]  # of Vega-Lite: JSON

# Carried by vl-convert, which measures and draws labels with it; Arial is as wide.
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
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
COLORS = THEMES["light"]  # of every specification
_VEGA_LITE = "5.21"  # of those that vl-convert has the nearest to the one in Gradio's page
_SVG = "http://www.w3.org/2000/svg"
_SPOKEN = ("role", "aria-label", "aria-roledescription", "aria-hidden")
_DESCRIPTORS = 32  # that Vega's engine may want
_SCALE = 2  # pixels of a PNG to one of the plot


def pictures(plot: Spec) -> tuple[str, bytes]:
    """Return a plot as SVG and, for places that show none, as PNG.

    The SVG is a file of its own or a part of a page. It is light, and dark for readers who prefer
    that; what pointing at a mark tells is the mark's title. The PNG is light.

    Raise ValueError when Vega cannot draw the plot, OSError where too few files may be open.
    """
    import vl_convert
    from PIL import Image

    _check_descriptors()
    drawn = _told(vl_convert.vegalite_to_svg(plot, _VEGA_LITE), plot["description"])
    small = io.BytesIO()  # a tenth of vl-convert's own
    with Image.open(io.BytesIO(vl_convert.svg_to_png(drawn, scale=_SCALE))) as image:
        flat = image.convert("RGB").quantize(
            128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        flat.save(small, "PNG", optimize=True)
    return drawn, small.getvalue()


def _check_descriptors() -> None:
    """Raise OSError where no file can be opened: Vega's engine would end the process."""
    opened: list[int] = []
    try:
        for _ in range(_DESCRIPTORS):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _told(drawn: str, about: str) -> str:
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(drawn)
    for mark in list(root.iter()):
        said = {name: mark.attrib.pop(name, "") for name in _SPOKEN}
        if said["role"] == "graphics-symbol":
            ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = said["aria-label"]
    title, style = (ElementTree.Element(f"{{{_SVG}}}{name}") for name in ("title", "style"))
    title.text = about
    rules = "".join(
        f'[{what}="{color}"]{{{what}:{THEMES["dark"][role]}}}'
        for role, color in COLORS.items()
        for what in ("fill", "stroke")
    )
    style.text = f"@media(prefers-color-scheme:dark){{{rules}}}"
    root[:0] = [title, style]
    root.set("role", "img")
    return ElementTree.tostring(root, "unicode") + "\n"
