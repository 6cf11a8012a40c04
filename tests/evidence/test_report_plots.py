"""The plots as Vega-Lite specifications, and the SVG and PNG that Vega makes of them."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageChops
from test_report import divergence, family, row, values

from quantkit.evidence import report
from quantkit.evidence.report import plots
from quantkit.evidence.report.render import THEMES, Spec, pictures
from quantkit.evidence.report.schema import Tensor, TracePoint

NAMES = ["frontier", "domains", "tensor-map", "bits-by-kind", "convergence"]
# Files as close to each other as those of one model are: size in MB and KL.
CROWD = {
    **{"Q2_K": (52.1, 0.62), "IQ3_XXS": (58.0, 0.41), "Q3_K_S": (60.2, 0.33)},
    **{"IQ3_S": (61.5, 0.27), "Q3_K_M": (66.0, 0.19), "IQ4_XS": (71.8, 0.083)},
    **{"Q4_0 --pure": (72.0, 0.141), "IQ4_NL": (73.5, 0.079), "Q4_K_S": (74.5, 0.072)},
    **{"Q4_K_M": (77.0, 0.059), "Q5_0": (85.0, 0.033), "Q5_K_M": (88.0, 0.021)},
    **{"Q4_K": (75.5, 0.049)},
}


def drawn(value: dict[str, Any] | None = None) -> dict[str, Spec]:
    return plots.draw_all(report.read(value or values()))


def data(plot: Spec) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = plot["data"]["values"]
    return rows


def crowd() -> dict[str, Any]:
    """A report of 14 files."""
    value = values()
    value["outputs"][0] |= {"n_bytes": 76_900_000, "kl": interval(0.035)}
    value["baselines"] = [
        row(name=name, n_bytes=int(mb * 1e6), kl=interval(kl)) for name, (mb, kl) in CROWD.items()
    ]
    value["baselines"][-1]["kind"] = "uniform"
    return value


def interval(kl: float) -> dict[str, Any]:
    return divergence(kl, kl / 10, [0.8 * kl, 1.25 * kl])


def texts(svg: str) -> dict[str, tuple[float, float, str]]:
    """Every line of text: where it begins or ends, and its anchor."""
    found = {}
    for element, (x, y) in placed(ElementTree.fromstring(svg)):
        if element.tag.endswith("text"):
            found["".join(element.itertext())] = x, y, element.get("text-anchor", "")
    return found


def placed(
    element: ElementTree.Element, at: tuple[float, float] = (0.0, 0.0)
) -> Iterator[tuple[ElementTree.Element, tuple[float, float]]]:
    """All elements and where their groups put them."""
    moved = re.match(r"translate\(([-\d.e]+),([-\d.e]+)\)", element.get("transform", ""))
    if moved:
        at = at[0] + float(moved[1]), at[1] + float(moved[2])
    yield element, at
    for child in element:
        yield from placed(child, at)


def test_the_frontier_has_every_file_where_it_belongs() -> None:
    found = {datum["about"].split(":")[0]: datum for datum in data(drawn()["frontier"])}
    assert set(found) == {
        "Tiny-EVO-Q4_K_M.gguf",
        "llama.cpp Q4_K_S",
        "llama.cpp Q5_1 pure",
        "llama.cpp Q4_K_M",
    }
    ours = found["Tiny-EVO-Q4_K_M.gguf"]
    assert (ours["size"], ours["kl"], ours["label"]) == (1.0, 0.0123, "this file")
    assert (ours["low"], ours["high"]) == (0.0115, 0.0131), "the 95 % interval"
    assert ours["about"] == "Tiny-EVO-Q4_K_M.gguf: 1.0 MB, KL 0.0123"
    best = [found[f"llama.cpp {name}"]["best"] for name in ("Q4_K_S", "Q5_1 pure", "Q4_K_M")]
    assert best == [0.05, 0.0246, 0.001] and "best" not in ours


def test_of_several_outputs_each_has_its_own_name_and_shape() -> None:
    value = family()
    third = {**value["outputs"][1], "name": "Tiny-EVO-6.62bpw-Q6_K.gguf", "n_bytes": 2_100_000}
    value["outputs"].append(third)
    labels = {"ours, Q4_K_M", "ours, Q6_K", "ours, 6.62bpw-Q6_K"}
    plots_ = drawn(value)
    assert labels < {datum["label"] for datum in data(plots_["frontier"])}
    assert {d["name"] for d in data(plots_["domains"]) if d["kind"] == "ours"} == labels
    for name in ("frontier", "domains"):
        assert "this file" not in json.dumps(plots_[name])
        encoding = next(x["encoding"] for x in plots_[name]["layer"] if "shape" in x["encoding"])
        shapes = dict(zip(*encoding["shape"]["scale"].values(), strict=True))
        assert len({shapes[label] for label in labels}) == 3
        assert shapes["llama.cpp"] == "circle"
    assert labels < texts(pictures(plots_["domains"])[0]).keys(), "the legend names every file"


def test_the_best_so_far_never_goes_up() -> None:
    value = values()
    value["baselines"][2]["kl"] = divergence(0.04, 0.001)  # the largest is not the best
    steps = [datum["best"] for datum in data(drawn(value)["frontier"]) if "best" in datum]
    assert steps == [0.05, 0.0246, 0.0246]


def test_labels_cover_nothing() -> None:
    """Of 14 files: they stand right of every mark, one below the other, in the order of the KL."""
    plot = drawn(crowd())["frontier"]
    svg, _ = pictures(plot)
    found = texts(svg)
    by_kl = [datum["label"] for datum in sorted(data(plot), key=lambda datum: -datum["kl"])]
    assert len(by_kl) == 14
    places = [found[label] for label in by_kl]
    assert len({x for x, _, _ in places}) == 1
    assert all(below[1] - above[1] > 13.9 for above, below in pairwise(places))
    marks = [
        (x, y) for e, (x, y) in placed(ElementTree.fromstring(svg)) if "stroke-width" in e.attrib
    ]
    assert marks and max(x for x, _ in marks) < places[0][0]
    level = {datum["label"]: datum["place"] / datum["kl"] for datum in data(plot)}
    assert level["Q2_K"] == pytest.approx(1), "one with room stands where it belongs"


@pytest.mark.parametrize(
    ("values_", "expected"),
    [
        ([], []),
        ([1.0, 5.0, 9.0], [1.0, 5.0, 9.0]),
        ([1.0, 1.0], [0.0, 2.0]),
        ([0.0, 0.0, 0.0, 9.0], [-2.0, 0.0, 2.0, 9.0]),
        ([0.0, 3.0, 3.0, 3.0], [-0.75, 1.25, 3.25, 5.25]),
    ],
)
def test_labels_move_as_little_as_they_must(values_: list[float], expected: list[float]) -> None:
    assert plots.spread(values_, 2.0) == pytest.approx(expected)


@pytest.mark.parametrize("width", [320, 400, 880])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut(name: str, width: int) -> None:
    """What were cut would reach the edge of the picture, and there nothing is drawn."""
    value = crowd()
    value["outputs"][0]["name"] = "a-very-long-name-of-a-model-" * 3
    value["outputs"][0]["tensors"]["blk.0.a_very_long_kind_of_a_tensor.weight"] = {
        **{"qtype": "A_VERY_LONG_TYPE", "n_elements": 10, "n_bytes": 10}
    }
    for files in (value["outputs"], value["baselines"]):
        for file in files:
            file["domains"] |= {"a-very-long-name-of-a-text": file["domains"]["docs"]}
    value["baselines"][3] |= {"kind": "given", "name": "somebody-elses-very-long-name.gguf"}
    svg, png = pictures({**drawn(value)[name], "width": width})
    assert float(ElementTree.fromstring(svg).attrib["width"]) == pytest.approx(width, abs=1)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    drawn_in = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    assert drawn_in is not None
    left, top, right, bottom = drawn_in
    assert min(left, top, image.width - right, image.height - bottom) >= 8


def test_the_map_has_a_cell_for_every_tensor() -> None:
    plot = drawn()["tensor-map"]
    told = [datum["about"] for datum in data(plot)]
    assert len(told) == 7 and "blk.2.ffn_up.weight: Q8_0" in told
    assert plot["encoding"]["y"]["scale"]["domain"] == ["attn_q", "ffn_up", "token_embd"]
    assert {"attn_q", "ffn_up", "token_embd", "Q4_K", "Q6_K", "Q8_0"} <= texts(
        pictures(plot)[0]
    ).keys()
    assert plot["description"] == "The type of each of 7 tensors: 3 types over 3 blocks"


def test_colors_follow_the_bits() -> None:
    colors = plots.colors_of({"Q8_0", "Q2_K", "Q4_K", "NOT_A_TYPE"})
    assert list(colors) == ["Q2_K", "Q4_K", "Q8_0", "NOT_A_TYPE"]
    assert len(set(colors.values())) == 4


def test_bits_by_kind_are_the_bytes() -> None:
    plot = drawn()["bits-by-kind"]
    assert {datum["kind"]: round(datum["bits"], 2) for datum in data(plot)} == {
        **{"attn_q": 4.5, "ffn_up": 8.5, "token_embd": 6.56}
    }
    assert sum(float(datum["share"].split()[0]) for datum in data(plot)) == pytest.approx(100, 0.01)
    assert plot["description"] == "Bits per weight: attn_q 4.50, ffn_up 8.50, token_embd 6.56"


def test_the_domains_have_every_file() -> None:
    found = data(drawn()["domains"])
    assert len(found) == 4 * 2 and {datum["domain"] for datum in found} == {"docs", "code"}
    assert "llama.cpp Q4_K_S on docs: KL 0.0123" in [datum["about"] for datum in found]


def test_the_convergence_is_the_trace() -> None:
    plot = drawn()["convergence"]
    assert [datum["kl"] for datum in data(plot)] == [0.03 / i for i in range(1, 5)]
    assert [datum["last"] for datum in data(plot)] == [False, False, False, True]
    assert all(datum["low"] < datum["kl"] < datum["high"] for datum in data(plot))
    long = plots.convergence({"": [TracePoint(i, i, 1 / (i + 1), 0.0) for i in range(10_000)]})
    assert long is not None and len(data(long)) < 400 and data(long)[-1]["tokens"] == 9999


def test_of_several_files_a_page_shows_the_chosen_one() -> None:
    read = report.read(family())
    alone, together = plots.draw_all(read), plots.draw_all(read, together=True)
    assert {"tensor-map-1", "tensor-map-2"} <= alone.keys() and "tensor-map" not in alone
    names = [output.name for output in read.outputs]
    for name in ("tensor-map", "bits-by-kind"):
        assert "params" not in alone[f"{name}-1"]
        (choice,) = together[name]["params"]
        assert choice["bind"]["options"] == names and choice["value"] == names[0]
        assert {datum["file"] for datum in data(together[name])} == set(names)
    # Vega draws the first until another is chosen.
    assert pictures(together["tensor-map"])[0].count("<title>blk.") == 6


def test_little_data_is_no_plot() -> None:
    alone = values()
    alone["baselines"] = []
    assert plots.frontier(report.read(alone)) is None
    assert plots.convergence({"": [TracePoint(0, 1, 0.1, 0.01)]}) is None
    assert plots.convergence({"": [TracePoint(i, i, 0.0, 0.0) for i in range(3)]}) is None
    assert plots.tensor_map({}) is None and plots.bits_by_kind({}) is None
    assert plots.tensor_map({"": {}}) is None and plots.bits_by_kind({"": {}}) is None
    assert plots.tensor_map({"": {f"blk.{i}.x": "Q4_K" for i in range(20_001)}}) is None


def test_equal_sizes_and_values_are_drawn() -> None:
    same = values()
    for other in same["baselines"]:
        other |= {"n_bytes": 1_000_000, "kl": same["outputs"][0]["kl"]}
    made = [plots.frontier(report.read(same))]
    made.append(plots.convergence({"": [TracePoint(i, 5, 0.1, 0.0) for i in range(3)]}))
    made.append(plots.tensor_map({"": {"token_embd.weight": "Q4_K"}}))
    made.append(plots.tensor_map({"": {"blk.99999999999.x": "Q4_K"}}))
    made.append(plots.bits_by_kind({"": {"x": Tensor(qtype="Q4_K", n_elements=256, n_bytes=144)}}))
    for plot in made:
        assert plot is not None
        svg, _ = pictures(plot)
        assert "NaN" not in svg and "undefined" not in svg and "null" not in svg


@pytest.mark.parametrize("name", NAMES)
def test_the_same_report_gives_the_same_bytes(name: str) -> None:
    first, again = (pictures(drawn(copy.deepcopy(crowd()))[name]) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", NAMES)
def test_svg_says_what_it_shows_and_turns_dark(name: str) -> None:
    plot = drawn()[name]
    svg, _ = pictures(plot)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.findtext("{*}title") == plot["description"]
    assert "prefers-color-scheme:dark" in svg
    told = {element.text for element in root.iterfind(".//{*}title")}
    if name != "convergence":
        assert {datum["about"] for datum in data(plot)} <= told
    light = set(THEMES["light"].values())
    used = {element.get(what) for element in root.iter() for what in ("fill", "stroke")}
    assert used & light, "what the style sheets look for"
    for outside in ("http://", "https://", "<script", "@import", "url(", "href"):
        assert outside not in svg.replace("http://www.w3.org/2000/svg", ""), outside


def test_hostile_names_stay_text() -> None:
    made = plots.tensor_map(
        {"datum.x": {'blk.0."><script>.weight': "Q4_K", "<b>&": '"x', "' || datum": "a\\"}}
    )
    assert made is not None
    svg, _ = pictures(json.loads(json.dumps(made)))
    ElementTree.fromstring(svg)
    assert "<script" not in svg and "<b>" not in svg and "&lt;b&gt;&amp;" in svg


@pytest.mark.parametrize("name", NAMES)
def test_png_is_small_and_shows_the_picture(name: str) -> None:
    svg, png = pictures(drawn()[name])
    image = Image.open(io.BytesIO(png)).convert("RGB")
    root = ElementTree.fromstring(svg)
    assert image.size == (2 * int(root.attrib["width"]), 2 * int(root.attrib["height"]))
    assert image.getpixel((1, 1)) == (255, 255, 255) and len(png) < 40_000
    assert len(image.getcolors(1 << 24) or ()) > 20, "letters are drawn"
