"""What `quantkit plan` foretells of GPTQ, from a config and the GGUF's shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_llama

from quantkit.checkpoint.safetensors import write_shell_of
from quantkit.errors import QuantkitError
from quantkit.ggml.types import BF16
from quantkit.planning.coverage import foretell
from quantkit.sources.expected import block_widths
from quantkit.tensors import TensorSpec


def specs(**shapes: tuple[int, ...]) -> dict[str, TensorSpec]:
    """Tensors by name, `__` for a dot."""
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {name: TensorSpec(name, shape, BF16, True) for name, shape in names.items()}


def widths_of(folder: Path) -> list[dict[int, int]]:
    return [{columns: rows for columns, rows in block} for block in block_widths(str(folder))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, int]]:
    return widths_of(tiny_llama(tmp_path_factory.mktemp("coverage")))


def test_all_of_a_llama(model: list[dict[int, int]]) -> None:
    found = foretell(
        model,
        specs(
            token_embd__weight=(512, 64),
            output__weight=(512, 64),
            blk__0__attn_q__weight=(64, 64),
            blk__1__ffn_down__weight=(64, 128),
        ),
    )
    assert found.share == 1 and found.apart == {}


def test_a_tied_table_is_the_head(model: list[dict[int, int]]) -> None:
    found = foretell(model, specs(token_embd__weight=(512, 64)))
    assert found.share == 1 and not found.apart


def test_what_is_left_out_is_named(model: list[dict[int, int]]) -> None:
    found = foretell(
        model,
        specs(
            output__weight=(512, 64),
            blk__0__attn_k_b__weight=(4, 64, 16),
            blk__1__ffn_gate__weight=(1024, 64),
            blk__2__attn_q__weight=(64, 64),
        ),
    )
    assert found.share == 512 * 64 / ((512 + 64 + 1024 + 64) * 64)
    assert set(found.apart) == {"attn_k_b", "ffn_gate", "blk.2"}


def test_a_model_that_transformers_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["X"]}')
    write_shell_of(tmp_path / "model.safetensors", {"w": ("BF16", (2, 2))})
    with pytest.raises(QuantkitError, match="transformers cannot load"):
        widths_of(tmp_path)
