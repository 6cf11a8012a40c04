"""What a context takes, against llama.cpp's own word; families are in test_families."""

from __future__ import annotations

from pathlib import Path

import broken_ggufs
import gguf
import pytest
from tiny_gguf import Shape, write_llama

from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.contexts import RUNTIME_BYTES, ContextMemory, ask, context_memory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile(write_llama(tmp_path_factory.mktemp("context") / "base.gguf", Shape()))


def test_a_window_and_a_whole_cache() -> None:
    memory = ContextMemory(100, 1000, 4096, ((512, 7), (1024, 7), (2048, 107)), 5, None)
    assert memory.n_bytes(1) == memory.n_bytes(256) == 5 + 256 * 1100 + 7
    assert memory.n_bytes(1536) == 5 + 1536 * 1100 + 57
    assert memory.n_bytes(4096) == 5 + 4096 * 1100 + 214
    assert memory.n_bytes(8192) == 5 + 8192 * 100 + 4096 * 1000 + 428


@pytest.mark.parametrize("n_tokens", [512, 1024, 4096, 5000, 32_768, 131_072])
def test_it_is_what_llama_cpp_would_allocate(base: GgufFile, n_tokens: int) -> None:
    (layout,) = ask(base.path, [n_tokens])
    ((cache, n_cells),) = layout.caches
    assert n_cells == pytest.approx(n_tokens, rel=0.05)
    memory = context_memory(base)
    assert not memory.note
    found = memory.n_bytes(n_tokens) - RUNTIME_BYTES
    assert found == pytest.approx(cache + layout.buffers, rel=0.02)


@pytest.mark.parametrize("n_tokens", [64, 300, 3000, 600_000])
def test_it_is_never_less(base: GgufFile, n_tokens: int) -> None:
    (layout,) = ask(base.path, [n_tokens])
    taken = layout.buffers + sum(n_bytes for n_bytes, _ in layout.caches)
    assert context_memory(base).n_bytes(n_tokens) - RUNTIME_BYTES > 0.999 * taken


def test_keys_and_values_by_hand(base: GgufFile) -> None:
    """float16 keys and values of every layer."""
    key = base.metadata["llama.embedding_length"] // base.metadata["llama.attention.head_count"]
    heads = base.metadata["llama.attention.head_count_kv"]
    n_bytes = 2 * 2 * base.metadata["llama.block_count"] * key * heads
    ((cache, n_cells),) = ask(base.path, [65_536])[0].caches
    assert cache / n_cells == pytest.approx(n_bytes, rel=0.01)


def test_a_model_that_llama_cpp_does_not_open(base: GgufFile, tmp_path: Path) -> None:
    """Counted from the metadata, which is more, and said."""
    writer = gguf.GGUFWriter(tmp_path / "moon.gguf", "moon")
    for name in ("block_count", "embedding_length", "context_length"):
        writer.add_uint32(f"moon.{name}", base.metadata[f"llama.{name}"])
    for name in ("head_count", "head_count_kv"):
        writer.add_uint32(f"moon.attention.{name}", base.metadata[f"llama.attention.{name}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    moon = GgufFile(tmp_path / "moon.gguf")
    with pytest.raises(ValueError, match="reports no caches"):
        ask(moon.path, [512])
    counted, asked = context_memory(moon), context_memory(base)
    assert "could not say" in counted.note
    whole = 2 * 2 * base.metadata["llama.block_count"] * base.metadata["llama.embedding_length"]
    assert 0 < counted.bytes_per_token <= whole
    assert counted.trained_tokens == asked.trained_tokens


def test_a_model_that_llama_cpp_does_not_survive(base: GgufFile, tmp_path: Path) -> None:
    """It dies in the sandbox, and what a context takes is counted."""
    path = tmp_path / "evil.gguf"
    cases = broken_ggufs.cases(base.path.read_bytes(), n_flips=0)
    path.write_bytes(cases["experts without tensors"])
    with pytest.raises(QuantkitError):
        ask(path, [512])
    assert context_memory(GgufFile(path)).note
