"""Quantized checkpoints whose integers GGUF holds: code for code, as libggml reads the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CHEAP, Run, quantkit
from safetensors.torch import load_file, save_file
from test_dequantize import AUTO_ROUND, Tensors, compressed_settings, names_in, packed
from tiny_models import tiny_llama

from quantkit.checkpoint.quantized import source_of
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gptq.carried import carried_files, carried_rows
from quantkit.llamacpp.converter.convert import convert
from quantkit.planning.plan import specs_of
from quantkit.sandbox.untrusted import Settings
from quantkit.sources.carry import CarryOver, carry_over
from quantkit.sources.dequantize import dequantize
from quantkit.tensors import TensorSpec

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def grid(
    shape: tuple[int, ...], bits: int, group: int, symmetric: bool, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (n_out, n_in), zeros and scales (n_out, n_groups); scales lie around those of a Llama
    that somebody trained.
    """
    generator = torch.Generator().manual_seed(seed)
    n_out, n_in = shape
    groups = n_out, n_in // group
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    if symmetric:
        zeros = torch.full(groups, 2 ** (bits - 1))
    else:
        zeros = torch.randint(1, 2**bits, groups, generator=generator)
    scales = (torch.rand(groups, generator=generator) + 0.5) / 2**bits / n_in**0.5
    return codes, zeros, scales.half()


def stored_as(
    kind: str, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int
) -> Tensors:
    if kind == "compressed":
        half = 2 ** (bits - 1)
        stored = {
            "weight_packed": packed(codes, range(32 // bits), bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(codes.shape),
        }
        if not bool((zeros == half).all()):
            stored["weight_zero_point"] = packed(zeros.T, range(32 // bits), bits).T.contiguous()
        return stored
    along = zeros.T.contiguous(), scales.T.contiguous()
    if kind == "awq":
        return {
            "qweight": packed(codes.T, AWQ_ORDER),
            "qzeros": packed(along[0], AWQ_ORDER),
            "scales": along[1],
        }
    order = range(32 // bits)
    return {
        "qweight": packed(codes, order, bits).T.contiguous(),
        "qzeros": packed(along[0] - 1, order, bits),
        "scales": along[1],
        "g_idx": (torch.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1])).int(),
    }


def settings_of(kind: str, bits: int, group: int) -> dict[str, Any]:
    plain = {"bits": bits, "group_size": group}
    return {
        "compressed": compressed_settings("pack-quantized", bits, group),
        "gptq": {"quant_method": "gptq", **plain},
        "awq": {"quant_method": "awq", "version": "gemm", **plain},
        "autoround": {**AUTO_ROUND, **plain, "packing_format": "auto_round:auto_gptq"},
    }[kind]


def write(folder: Path, kind: str, bits: int, group: int, symmetric: bool) -> tuple[Path, Tensors]:
    """A tiny Llama stored so, and what its weights are, in float32: nothing is rounded there."""
    base = tiny_llama(folder, hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    stored, wanted = {}, {}
    for i, (name, tensor) in enumerate(load_file(base / "model.safetensors").items()):
        if "_proj" not in name:
            stored[name] = tensor.half()
            continue
        codes, zeros, scales = grid(tuple(tensor.shape), bits, group, symmetric, i)
        wide = [x.repeat_interleave(group, 1) for x in (zeros, scales.float())]
        wanted[name] = (codes - wide[0]).float() * wide[1]
        stem = name.removesuffix("weight")
        parts = stored_as("gptq" if kind == "autoround" else kind, codes, zeros, scales, bits)
        stored |= {stem + end: part for end, part in parts.items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    settings |= {"quantization_config": settings_of(kind, bits, group), "dtype": "float16"}
    (base / "config.json").write_text(json.dumps(settings))
    return base, wanted


NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def in_file_order(tensor: str, weight: torch.Tensor, n_heads: int = 4) -> np.ndarray:
    """Rows as llama.cpp's converter puts them: halves of a head's q and k side by side."""
    if "attn_q" in tensor or "attn_k" in tensor:
        heads = n_heads if "attn_q" in tensor else n_heads // 2
        weight = weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).flatten(0, 2)
    return weight.numpy()


def of_file(tensor: str, wanted: Tensors) -> np.ndarray:
    _, block, kind, _ = tensor.split(".")
    return in_file_order(tensor, wanted[f"model.layers.{block}.{NAMES[kind]}.weight"])


def carried(
    folder: Path, checkpoint: Path
) -> tuple[CarryOver, dict[str, TensorSpec], dict[str, Path]]:
    config = Settings(json.loads((checkpoint / "config.json").read_text()))
    source = source_of("x/y", config, ())
    assert source is not None
    names = names_in(checkpoint)
    dequantize(checkpoint, names, source, folder / "expanded")
    convert(folder / "expanded", folder / "base.gguf", model_name="m")
    base = GgufFile(folder / "base.gguf")
    specs = specs_of(base)
    over = carry_over(checkpoint, names, source, base, specs, folder / "carried")
    return over, over.specs(specs), carried_files(folder / "carried")


@pytest.mark.parametrize(
    ("kind", "bits", "group", "symmetric", "qtype"),
    [
        ("compressed", 4, 32, True, "Q4_0"),
        ("gptq", 2, 64, True, "Q2_0"),
        ("autoround", 4, 128, True, "Q4_0"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("compressed", 8, 128, True, "Q8_0"),
                ("compressed", 4, 64, False, "Q5_0"),
                ("gptq", 4, 128, False, "Q5_0"),
                ("awq", 4, 64, False, "Q5_0"),
                ("autoround", 2, 128, True, "Q2_0"),
            )
        ),
    ],
)
def test_codes_are_in_the_file(
    tmp_path: Path, kind: str, bits: int, group: int, symmetric: bool, qtype: str
) -> None:
    checkpoint, wanted = write(tmp_path / "m", kind, bits, group, symmetric)
    over, specs, files = carried(tmp_path, checkpoint)
    exact = {row.tensor: row for row in over.carried if row.is_exact}
    assert len(exact) == len(wanted) == 7 and not over.missed
    for name, row in exact.items():
        assert row.qtype == qtype and row.n_equal == row.n_weights and row.relative == 0
        kept = QuantType(qtype)
        assert kept in specs[name].carried
        rows = carried_rows(files, name, [kept], slice(None))[kept, "exact"]
        assert np.array_equal(native.dequantize(rows, kept), of_file(name, wanted))
        part = carried_rows(files, name, [kept], slice(3, 9))[kept, "exact"]
        assert np.array_equal(part, rows[3:9])


def test_a_minimum_that_is_rounded_is_offered_and_said(tmp_path: Path) -> None:
    """Affine 4 bits: Q4_1 is nearly the source, and smaller than Q5_0, which is the source."""
    checkpoint, wanted = write(tmp_path / "m", "awq", 4, 64, False)
    over, specs, files = carried(tmp_path, checkpoint)
    near = [row for row in over.carried if not row.is_exact]
    assert near and {row.qtype for row in near} == {"Q4_1"}
    for row in near:
        assert 0 < row.relative < 1e-6 and row.n_weights > row.n_equal > 0
        kept = QuantType("Q4_1")
        values = native.dequantize(
            carried_rows(files, row.tensor, [kept], slice(None))[kept, "carried"], kept
        )
        source = of_file(row.tensor, wanted)
        assert int((values == source).sum()) == row.n_equal
        off = np.square(values.astype(float) - source).sum() / np.square(source.astype(float)).sum()
        assert off == pytest.approx(row.relative, rel=1e-6)
        assert [str(q) for q in specs[row.tensor].carried] == ["Q4_1", "Q5_0"]


def test_groups_in_an_order_of_their_own_are_said(tmp_path: Path) -> None:
    checkpoint, _ = write(tmp_path / "m", "gptq", 4, 32, True)
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name] = tensors[name][torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    over, specs, _ = carried(tmp_path, checkpoint)
    (missed,) = over.missed
    assert missed.tensor == "blk.0.ffn_up.weight" and "act order" in missed.reason
    assert specs[missed.tensor].carried == ()
    assert len(over.carried) == 6


@pytest.mark.slow
def test_a_run_has_the_sources_codes(tmp_path: Path, offline: dict[str, str]) -> None:
    """To the bit in the finished file, tuned or not; the report counts them."""
    checkpoint, wanted = write(tmp_path / "Tiny-W4A16", "compressed", 4, 32, True)
    answer = quantkit(
        "run",
        checkpoint,
        "--out",
        tmp_path / "run",
        *CHEAP,
        "--levels",
        "Q4_K,Q6_K,Q8_0",
        "--tuning",
        "2",
        "--json",
        env=offline,
    )
    assert answer.code == 0, answer.err
    run = Run(tmp_path / "run")
    (output,) = (run.folder / "7-stitch").glob("*.gguf")
    file = GgufFile(output)
    names = [
        name for name in file.tensors if "_" in name and ".weight" in name and "norm" not in name
    ]
    linear = [name for name in names if name.startswith("blk.")]
    assert len(linear) == 7
    for name in linear:
        assert str(file.tensors[name].qtype) == "Q4_0"
        assert np.array_equal(file.values(name).reshape(-1), of_file(name, wanted).reshape(-1))
    report = (run.folder / "8-validate/report.md").read_text()
    assert "carried over exactly as Q4_0" in report
