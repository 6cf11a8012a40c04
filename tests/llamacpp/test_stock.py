"""Stock files: what we say of them against the files that llama_model_quantize really writes.

And ours against theirs: the file stitched from tensors that were quantized one by one, with the
same importances, holds the very bytes of the file that llama.cpp makes with those types.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_gguf import Shape, write_llama

from quantkit.errors import QuantkitError
from quantkit.ggml.types import BF16, FILE_TYPES, STOCK_MIXES, QuantType
from quantkit.gguf_file.fields import Field
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import SlotFile, lay_out
from quantkit.gptq.select import Inputs, solve_tensor
from quantkit.llamacpp import stock
from quantkit.llamacpp.output import label_of
from quantkit.llamacpp.stock import (
    StockRecipe,
    make_stock,
    quantizable_tensors,
    stock_bytes,
    stock_types,
)

SOME = ("Q2_K", "Q4_0", "Q4_K_M", "Q8_0")
SLOW = (
    "Q3_K_M",
    "IQ4_XS",
    "Q5_K_S",
    "Q6_K",
    "Q2_K_S",
    "Q3_K_L",
    "IQ3_XXS",
    "IQ3_M",
    "IQ4_NL",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q5_K_M",
)


@pytest.fixture(scope="module", params=["wide", "narrow", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    shape = {
        "wide": Shape(n_embd=256, n_ff=512, n_layer=4),
        "narrow": Shape(n_embd=64, n_ff=96, n_layer=2, stored="F16"),
        "tied": Shape(n_embd=256, n_ff=96, n_layer=2, tied=True),  # falls back in part
    }[request.param]
    return GgufFile(write_llama(tmp_path_factory.mktemp(request.param) / "base.gguf", shape))


def imatrix(base: GgufFile) -> dict[str, np.ndarray]:
    """As llama-imatrix leaves it: blocks only."""
    rng = np.random.default_rng(0)
    return {
        name: rng.random(tensor.shape[-1], np.float32) + np.float32(0.01)
        for name, tensor in base.tensors.items()
        if len(tensor.shape) == 2 and name.startswith("blk.")
    }


def types_in(path: Path) -> dict[str, QuantType]:
    return {name: tensor.qtype for name, tensor in GgufFile(path).tensors.items()}


LABELS = [*SOME, *(pytest.param(label, marks=pytest.mark.slow) for label in SLOW)]


@pytest.mark.parametrize("pure", [False, True], ids=["mix", "pure"])
@pytest.mark.parametrize("label", LABELS)
def test_a_dry_run_says_what_is_written(
    base: GgufFile, label: str, pure: bool, tmp_path: Path
) -> None:
    """Types of all tensors, and the size to the byte: through the C function there is not even
    metadata about the imatrix.
    """
    recipe, path = StockRecipe(label, pure), tmp_path / "stock.gguf"
    make_stock(base.path, path, recipe, imatrix(base))
    assert types_in(path) == stock_types(base.path, recipe)
    assert path.stat().st_size == stock_bytes(base, recipe)
    assert GgufFile(path).metadata["general.file_type"] == FILE_TYPES[label]


@pytest.mark.parametrize("pure", [False, True], ids=["mix", "pure"])
def test_types_do_not_depend_on_the_vocabulary(
    base: GgufFile, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run is made on a file without one; on the file itself it says the same, of all."""
    recipes = [StockRecipe(label, pure) for label in STOCK_MIXES]
    found = [stock_types(base.path, recipe) for recipe in recipes]
    monkeypatch.setattr(stock, "_bare", nullcontext)
    assert [stock_types(base.path, recipe) for recipe in recipes] == found


def test_a_mix_is_a_mix_and_pure_is_not(base: GgufFile) -> None:
    mixed = stock_types(base.path, StockRecipe("Q4_K_M"))
    pure = stock_types(base.path, StockRecipe("Q4_K_M", pure=True))
    wide = {n for n, t in base.tensors.items() if len(t.shape) == 2 and t.shape[-1] == 256}
    if wide:
        assert {pure[name] for name in wide} == {QuantType("Q4_K")}
        assert len({mixed[name] for name in wide}) > 1


def test_all_mixes_can_be_asked_for(base: GgufFile) -> None:
    """Sizes rise from IQ1_S to Q8_0, if not strictly from one label to the next."""
    sizes = {label: stock_bytes(base, StockRecipe(label)) for label in STOCK_MIXES}
    assert min(sizes.values()) == sizes["IQ1_S"] and max(sizes.values()) == sizes["Q8_0"]
    assert sizes["Q2_K"] <= sizes["Q4_K_M"] <= sizes["Q6_K"]


def test_a_file_is_called_after_what_most_of_it_holds(base: GgufFile) -> None:
    """Also llama.cpp's own files, but for those whose mixes differ in single tensors."""
    for label in STOCK_MIXES:
        types = stock_types(base.path, StockRecipe(label))
        held = {str(q) for name, q in types.items() if not name.startswith(("token", "output"))}
        found = label_of(base, types)
        assert any(found.startswith(q) or q in ("IQ2_S", "IQ3_S", "IQ3_XXS") for q in held)
        assert found in held | set(STOCK_MIXES)
    blocks = {name: QuantType("Q4_0") for name in types if name.startswith("blk")}
    tables = {name: QuantType("Q8_0") for name in types if name not in blocks}
    assert label_of(base, blocks | tables) == "Q4_0"
    assert label_of(base, tables) == (
        "BF16" if base.tensors["blk.0.attn_q.weight"].qtype == BF16 else "F16"
    )


def test_what_is_quantizable(base: GgufFile) -> None:
    found = quantizable_tensors(base.path)
    assert found == {name for name, t in base.tensors.items() if len(t.shape) == 2}


def test_nothing_is_written_by_a_dry_run(base: GgufFile) -> None:
    before = (base.path.stat(), sorted(base.path.parent.iterdir()))
    stock_types(base.path, StockRecipe("Q2_K"))
    assert (base.path.stat(), sorted(base.path.parent.iterdir())) == before


def solved_types(base: GgufFile, seed: int) -> dict[str, QuantType]:
    """A random type for every matrix."""
    rng = np.random.default_rng(seed)
    names = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_1", "Q8_0")
    chosen = {}
    for name, tensor in base.tensors.items():
        fitting = [q for q in map(QuantType, names) if q.fits(tensor.shape[-1])]
        if len(tensor.shape) == 2:
            chosen[name] = fitting[rng.integers(len(fitting))]
    return chosen


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stitched_file_without_gptq_is_llama_cpps_own(
    base: GgufFile, seed: int, tmp_path: Path
) -> None:
    """Tensor for tensor, byte for byte."""
    types, importances = solved_types(base, seed), imatrix(base)
    theirs = tmp_path / "theirs.gguf"
    make_stock(base.path, theirs, StockRecipe("Q4_K_M"), importances, types)
    path = tmp_path / "ours.gguf"
    layout = lay_out(base, types, [Field.uint32("general.file_type", FILE_TYPES["Q4_K_M"])])
    file = SlotFile(path, layout)
    for name in base.tensors:
        if name not in types:
            file.write(name, base.packed(name))
            continue
        known = importances.get(name)
        inputs = None
        if known is not None:
            h = torch.diag(torch.from_numpy(known))
            inputs = Inputs(known, h, h, None)
        weight = torch.from_numpy(base.values(name))
        solved = solve_tensor(weight, [types[name]], ("imatrix",), inputs, None)
        assert solved[types[name]].method == ("rtn" if known is None else "imatrix")
        file.write(name, solved[types[name]].packed)
    file.finish()
    ours_, theirs_ = GgufFile(path), GgufFile(theirs)
    assert types_in(path) == types_in(theirs)
    for name in base.tensors:
        assert np.array_equal(ours_.packed(name), theirs_.packed(name)), name
    assert path.stat().st_size == theirs.stat().st_size  # the order of tensors differs


def test_the_imatrix_reaches_llama_cpp(base: GgufFile, tmp_path: Path) -> None:
    recipe = StockRecipe("Q4_0")
    flat = {name: np.ones_like(v) for name, v in imatrix(base).items()}
    make_stock(base.path, tmp_path / "a.gguf", recipe, imatrix(base))
    make_stock(base.path, tmp_path / "b.gguf", recipe, flat)
    one, other = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    name = "blk.0.ffn_up.weight"
    assert not np.array_equal(one.packed(name), other.packed(name))
    assert np.array_equal(one.packed("token_embd.weight"), other.packed("token_embd.weight"))


def test_failures_are_told_in_llama_cpps_words(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "base.gguf", Shape(n_embd=64, n_ff=64))
    with pytest.raises(QuantkitError, match=r"base\.gguf"):
        stock_types(path, StockRecipe("Q1_0"))  # blocks of 128, no fallback
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"lllma"))  # no such architecture
    with pytest.raises(QuantkitError, match="lllma"):
        stock_types(path, StockRecipe("Q4_0"))
    path.write_bytes(data[:2000])
    with pytest.raises(QuantkitError):
        stock_types(path, StockRecipe("Q4_0"))
    with pytest.raises(QuantkitError):
        make_stock(path, tmp_path / "out.gguf", StockRecipe("Q4_0"), {})
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(ValueError, match="Q4_K"):
        StockRecipe("Q4_K")  # a tensor type


_PURE = """
import sys
from pathlib import Path
from test_stock import imatrix
from tiny_gguf import write_llama
from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.stock import StockRecipe, make_stock
folder = Path(sys.argv[1])
base = GgufFile(write_llama(folder / "base.gguf"))
try:
    make_stock(base.path, folder / "out.gguf", StockRecipe("IQ2_XXS", pure=True), imatrix(base))
except QuantkitError as error:
    print(error.message.split(": ")[1].split(",")[0])
"""


@pytest.mark.slow
def test_a_codebook_without_importances_does_not_end_the_process(tmp_path: Path) -> None:
    path = ":".join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", _PURE, str(tmp_path)],
        env={"PYTHONPATH": path, "PATH": ""},
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().strip() == "output.weight would be IQ2_XXS"
