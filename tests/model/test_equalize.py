"""Channels equalized: the same model bit for bit, whose roundings cost less.

pytest tests/model/test_equalize.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, write_checkpoint
from safetensors.torch import load_file, save_file

from quantkit.errors import QuantkitError
from quantkit.model import equalize as module
from quantkit.model.equalize import GROUP, Powers, equalize, moved_cost
from quantkit.model.streaming import open_model
from quantkit.sources.equalized import write

# Parameters whose rows are divided in the first block, as far as they are written there.
PLACES = {
    "Llama 3": {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"},
    "Qwen3": {"input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"},
}


def ids(n: int = 64) -> torch.Tensor:
    return torch.randint(5, 200, (2, n), generator=torch.Generator().manual_seed(0))


def cost(x: torch.Tensor, w: torch.Tensor, log2_scale: torch.Tensor) -> float:
    return float(sum(moved_cost(x, w, log2_scale)))


def write_uneven(name: str, folder: Path) -> Path:
    """A model that has outliers: some channels of every norm and layer are far larger."""
    write_checkpoint(FAMILIES[name], folder)
    for path in folder.glob("*.safetensors"):
        whole = load_file(path)
        for tensor, values in whole.items():
            if tensor.endswith(("norm.weight", "_proj.weight")) and values.dim() < 3:
                values[3::16] *= 32
                values[..., 5::16] /= 8
        save_file(whole, path, metadata={"format": "pt"})
    return folder


def files_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "name",
    [n if n in PLACES else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES],
)
def test_the_written_model_answers_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Or its checkpoint is refused, which stores parameters otherwise: never another model."""
    folder = write_uneven(name, tmp_path / "model")
    original = open_model(folder)
    with torch.no_grad():
        wanted = original.model(input_ids=ids(), use_cache=False).logits
    try:
        powers = equalize(open_model(folder), ids())
        write(folder, files_in(folder), powers, tmp_path / "out")
    except QuantkitError as error:
        assert "--equalize" in error.remedy and name not in PLACES
        return
    again = open_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids(), use_cache=False).logits, wanted)
    first = {n.split(".layers.0.")[-1].rsplit(".", 2)[-2] for n in powers.rows if ".layers.0." in n}
    assert PLACES.get(name, set()) <= first


def test_streamed_blocks_give_the_same_powers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_uneven("Llama 3", tmp_path / "model")
    whole = equalize(open_model(folder), ids())
    monkeypatch.setenv("QUANTKIT_MEMORY", "1kB")
    model = open_model(folder)
    assert model.is_streamed
    streamed = equalize(model, ids())
    for one, other in ((whole.rows, streamed.rows), (whole.columns, streamed.columns)):
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_outlier_no_longer_spoils_its_group() -> None:
    """The channel of large values and small weights shrinks; without one there is little to win."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=generator) for n in (200, 40))
    scale = torch.zeros(64)
    even = cost(x, w, scale)
    x[:, 3] *= 64
    w[:, 3] /= 64
    spoiled = cost(x, w, scale)
    scale[3] = 6
    assert cost(x, w, scale) == pytest.approx(even, rel=1e-4)
    assert spoiled > 5 * even
    common = torch.full((64,), 3.0)  # a scale that all share changes nothing
    assert cost(x, w, scale + common) == pytest.approx(even, rel=1e-4)


def test_what_a_step_costs() -> None:
    """Of one group whose values are dense: the mean squared error of rounding them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, GROUP, generator=generator) * 2 - 1
    w = torch.randn(6, GROUP, generator=generator)
    step = x.abs().amax(1, keepdim=True) / 127
    error = ((x / step).round() * step - x) @ w.T
    of_x, _ = moved_cost(x, w, torch.zeros(GROUP))
    assert float(error.square().sum(1).mean()) == pytest.approx(float(of_x), rel=0.05)


def test_powers_are_kept_where_the_dtype_holds_them(tmp_path: Path) -> None:
    """A weight of float16 that a power would make subnormal keeps its channel."""
    block = torch.nn.Sequential(torch.nn.RMSNorm(32), torch.nn.Linear(32, 8, bias=False)).half()
    with torch.no_grad():
        block[0].weight.fill_(1)
        block[1].weight.fill_(1)
        block[1].weight[:, 5] = (
            6.1095e-5  # its last bit is set, and it is the smallest normal number
        )
    place = module.Place("0", 0, 32, ("1",), torch.arange(32))
    moved = module._moved(block, place, torch.full((32,), -4.0))
    assert moved.columns["1.weight"][5] == 0 and moved.columns["1.weight"][4] == -4
    assert moved.rows["0.weight"][5] == 0 and moved.rows["0.weight"][4] == 4


def test_powers_are_read_as_they_were_written(tmp_path: Path) -> None:
    powers = Powers(
        {"a.weight": torch.tensor([1, -2], dtype=torch.int8)},
        {"b.weight": torch.tensor([3], dtype=torch.int8)},
    )
    read = Powers.load(powers.save(tmp_path / "powers.safetensors"))
    assert read.names() == {"a.weight", "b.weight"}
    assert torch.equal(read.rows["a.weight"], powers.rows["a.weight"])
    values = torch.tensor([[3.0, 5.0]]).T
    assert torch.equal(read.apply("a.weight", values), torch.tensor([[6.0, 1.25]]).T)


def test_a_checkpoint_with_other_names_is_refused(tmp_path: Path) -> None:
    folder = write_uneven("Llama 3", tmp_path / "model")
    powers = Powers({"model.nothing.weight": torch.zeros(4, dtype=torch.int8)})
    with pytest.raises(QuantkitError, match=r"does not store model\.nothing\.weight"):
        write(folder, files_in(folder), powers, tmp_path / "out")
    assert not (tmp_path / "out").exists()
