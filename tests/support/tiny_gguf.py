"""Small Llama GGUFs written straight with gguf-py, of any widths and stored type: no Hugging Face
model, no converter. llama.cpp reads and quantizes them; nothing is run on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType


@dataclass(frozen=True)
class Shape:
    """Widths of the model; `stored` is the type of its matrices."""

    n_embd: int = 256
    n_ff: int = 256
    n_layer: int = 2
    n_vocab: int = 300
    tied: bool = False
    stored: str = "BF16"
    seed: int = 0


def tensors(shape: Shape) -> dict[str, np.ndarray]:
    """Random float32 weights by GGUF name, in file order."""
    rng = np.random.default_rng(shape.seed)

    def matrix(n_rows: int, n_columns: int) -> np.ndarray:
        return rng.standard_normal((n_rows, n_columns), np.float32) / np.float32(np.sqrt(n_columns))

    d, f = shape.n_embd, shape.n_ff
    found = {"token_embd.weight": matrix(shape.n_vocab, d)}
    for i in range(shape.n_layer):
        found[f"blk.{i}.attn_norm.weight"] = np.ones(d, np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"blk.{i}.{name}.weight"] = matrix(d, d)
        found[f"blk.{i}.ffn_norm.weight"] = np.ones(d, np.float32)
        found[f"blk.{i}.ffn_gate.weight"] = matrix(f, d)
        found[f"blk.{i}.ffn_up.weight"] = matrix(f, d)
        found[f"blk.{i}.ffn_down.weight"] = matrix(d, f)
    found["output_norm.weight"] = np.ones(d, np.float32)
    if not shape.tied:
        found["output.weight"] = matrix(shape.n_vocab, d)
    return found


def write_llama(path: Path, shape: Shape = Shape(), alignment: int | None = None) -> Path:
    """Write the model of `shape`, with every kind of metadata value in it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny Llama")
    writer.add_context_length(128)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(shape.n_embd // 4)
    writer.add_rope_freq_base(10000.5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    writer.add_quantization_version(2)
    writer.add_uint64("test.uint64", 2**63 + 5)
    writer.add_int8("test.int8", -3)
    writer.add_float64("test.float64", 1 / 3)
    writer.add_bool("test.bool", False)
    writer.add_string("test.string", "gr\u00fc\u00df\u0394 \U0001f999\n")
    writer.add_array("test.floats", [0.1, -2.5])
    writer.add_array("test.bools", [True, False, True])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    _add_vocabulary(writer, shape.n_vocab)
    stored = GGMLQuantizationType[shape.stored]
    for name, values in tensors(shape).items():
        if values.ndim == 1 or stored == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A SentencePiece vocabulary: three specials, all bytes, filler."""
    kinds = gguf.TokenType
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*fixed, *(f"\u2581w{i}" for i in range(n_vocab - len(fixed)))])
    writer.add_token_scores([-1.0 * i for i in range(n_vocab)])
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * 256
        + [kinds.NORMAL] * (n_vocab - len(fixed))
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
