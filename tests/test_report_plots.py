"""The plots as pictures, and what SVG and PNG make of them."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_report import values

from quantkit.evidence import report
from quantkit.evidence.report import plots, svg
from quantkit.evidence.report.axes import Log, Place, place
from quantkit.evidence.report.picture import Area, Box, Disc, Picture, Stroke, Words, text_width
from quantkit.evidence.report.png import png
from quantkit.evidence.report.schema import TracePoint


def pictures() -> dict[str, Picture]:
    return plots.draw_all(report.read(values()))


def discs(picture: Picture) -> list[Disc]:
    return [item for item in picture.items if isinstance(item, Disc)]


def words(picture: Picture) -> list[str]:
    return [item.text for item in picture.items if isinstance(item, Words)]


def test_the_frontier_has_every_file_where_it_belongs() -> None:
    picture = pictures()["frontier"]
    marks = {mark.title.split(":")[0]: mark for mark in discs(picture)}
    assert set(marks) == {
        "Tiny-EVO-Q4_K_M.gguf",
        "llama.cpp Q4_K_S",
        "llama.cpp Q5_1 pure",
        "llama.cpp Q4_K_M",
    }
    ours, smaller = marks["Tiny-EVO-Q4_K_M.gguf"], marks["llama.cpp Q4_K_S"]
    assert smaller.x < ours.x < marks["llama.cpp Q4_K_M"].x
    assert smaller.y < ours.y, "less KL is further down"
    assert ours.fill == "accent" and smaller.fill == "card"
    assert "this file" in words(picture)


@pytest.mark.parametrize("name", ["frontier", "domains", "tensor-map", "bits-by-kind"])
def test_nothing_is_drawn_outside(name: str) -> None:
    picture = pictures()[name]
    for item in picture.items:
        if isinstance(item, Words):
            width = text_width(item.text, item.size)
            left = item.x - {"start": 0.0, "middle": width / 2, "end": width}[item.anchor]
            xs, ys = [left, left + width], [item.y - item.size, item.y]
        elif isinstance(item, Box):
            xs, ys = [item.x, item.x + item.width], [item.y, item.y + item.height]
        elif isinstance(item, Disc):
            xs, ys = [item.x - 6, item.x + 6], [item.y - 6, item.y + 6]
        else:
            xs, ys = [p[0] for p in item.points], [p[1] for p in item.points]
        assert min(xs) >= 0 and max(xs) <= picture.width, item
        assert min(ys) >= 0 and max(ys) <= picture.height, item


def test_the_map_has_a_cell_for_every_tensor() -> None:
    picture = pictures()["tensor-map"]
    titles = [item.title for item in picture.items if isinstance(item, Box) and item.title]
    assert len(titles) == 7 and "blk.2.ffn_up.weight: Q8_0" in titles
    assert {"attn_q", "ffn_up", "token_embd", "Q4_K", "Q6_K", "Q8_0"} <= set(words(picture))


def test_colours_follow_the_bits() -> None:
    colours = plots.colours_of({"Q8_0", "Q2_K", "Q4_K", "NOT_A_TYPE"})
    assert list(colours) == ["Q2_K", "Q4_K", "Q8_0", "NOT_A_TYPE"]
    assert len(set(colours.values())) == 4


def test_bits_by_kind_are_the_bytes() -> None:
    shown = words(pictures()["bits-by-kind"])
    assert "4.50" in shown and "8.50" in shown and "6.56" in shown
    shares = [float(x.split()[0]) for x in shown if x.endswith("of bytes")]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_the_convergence_never_goes_up() -> None:
    (line,) = [i for i in pictures()["convergence"].items if isinstance(i, Stroke) and i.width > 2]
    ys = [y for _, y in line.points]
    assert ys == sorted(ys) and len({*ys}) == 4


def test_little_data_is_no_picture() -> None:
    alone = values()
    alone["baselines"] = []
    assert plots.frontier(report.read(alone)) is None
    assert plots.convergence([TracePoint(0, 1, 0.1, 0.01)]) is None
    assert plots.convergence([TracePoint(i, i, 0.0, 0.0) for i in range(3)]) is None
    assert plots.tensor_map({}) is None and plots.bits_by_kind(()) is None
    assert plots.tensor_map({"blk.99999999999.x": "Q4_K"}) is None


def test_equal_sizes_and_values_are_drawn() -> None:
    same = values()
    for row in same["baselines"]:
        row |= {"n_bytes": 1_000_000, "kl": same["outputs"][0]["kl"]}
    picture = plots.frontier(report.read(same))
    assert picture is not None and "nan" not in svg.standalone(picture)
    assert plots.convergence([TracePoint(i, 5, 0.1, 0.0) for i in range(3)]) is not None


def test_ticks_are_few_and_inside() -> None:
    for low, high in ((0.001, 0.0012), (0.01, 0.5), (1e-6, 3.0)):
        scale = Log.over([low, high], 0.05)
        ticks = scale.ticks()
        assert 3 <= len(ticks) <= 7
        assert all(-1e-9 <= scale.share(tick) <= 1 + 1e-9 for tick in ticks)


def test_labels_make_room_for_each_other() -> None:
    labels = [Place(100 + 4 * i, 100, f"Q4_K_{i}", 11, False) for i in range(4)]
    found = place(labels, (0, 0, 400, 300))
    boxes = []
    for label in found:
        width = text_width(label.text, label.size)
        left = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
        boxes.append((left, label.y - label.size, left + width, label.y))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
            assert apart, (a, b)


@pytest.mark.parametrize("name", ["frontier", "domains", "tensor-map", "bits-by-kind"])
def test_svg_is_well_formed_and_turns_dark(name: str) -> None:
    made = svg.standalone(pictures()[name])
    root = ElementTree.fromstring(made)
    assert root.tag.endswith("svg") and root.find("{*}title") is not None
    assert "prefers-color-scheme:dark" in made and "var(" not in made
    inline = svg.inline(pictures()[name])
    ElementTree.fromstring(inline)
    assert "<style" not in inline and "var(--qk-" in inline


def test_hostile_names_stay_text() -> None:
    made = plots.tensor_map({'blk.0."><script>.weight': "Q4_K", "<b>&": '"x'})
    assert made is not None
    for shown in (svg.standalone(made), svg.inline(made)):
        ElementTree.fromstring(shown)
        assert "<script" not in shown and "<b>" not in shown


def test_png_shows_the_picture() -> None:
    picture = Picture(
        100,
        50,
        "a test",
        (
            Box(0, 0, 50, 50, "#ff0000"),
            Area(((50.0, 0.0), (100.0, 0.0), (100.0, 50.0), (50.0, 50.0)), "#0000ff", 0.5),
            Stroke(((0.0, 25.0), (100.0, 25.0)), "#00ff00", 4),
            Words(75, 20, "Text ±", 12, "middle", "ink", bold=True),
        ),
    )
    image = Image.open(io.BytesIO(png(picture))).convert("RGB")
    assert image.size == (200, 100)

    def near(at: tuple[int, int], colour: tuple[int, int, int]) -> bool:
        found = image.getpixel(at)
        assert isinstance(found, tuple)
        return all(abs(a - b) <= 12 for a, b in zip(found, colour, strict=True))

    assert near((20, 80), (255, 0, 0)) and near((20, 50), (0, 255, 0))
    assert near((180, 90), (128, 128, 255)), "half of blue on the white card"
    dark = Image.open(io.BytesIO(png(picture, "dark"))).convert("RGB")
    assert dark.getpixel((180, 90)) != image.getpixel((180, 90))


def test_every_plot_becomes_a_small_png() -> None:
    for name, picture in pictures().items():
        data = png(picture)
        assert data.startswith(b"\x89PNG") and len(data) < 120_000, name
