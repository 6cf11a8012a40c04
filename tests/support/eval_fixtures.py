"""Tiny Llama GGUF files made from scratch, and the same model computed in numpy.

`write_tiny` writes a random two-layer Llama with a byte-level SentencePiece vocabulary that
llama.cpp loads in milliseconds. `reference_logits` runs the very same weights in float64 numpy: the
golden numbers come from there and from nowhere near llama.cpp.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from evaluators.llama_runtime import Runtime

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "dog",
    "run",
    "in",
    "sun",
    "it",
    "was",
]
FIRST_BYTE = 3  # ids 0, 1, 2 are <unk>, <s>, </s>


@dataclass(frozen=True)
class TinySpec:
    """`noise` perturbs the seed's weights: a stand-in for a quantized file of the same base."""

    seed: int = 0
    noise: float = 0.0
    n_vocab: int = 320
    n_embd: int = 64
    n_head: int = 4
    n_ff: int = 96
    n_layer: int = 2
    n_ctx_train: int = 256
    add_bos: bool = True
    add_eos: bool = False
    template: str | None = None  # for chat


def pieces(spec: TinySpec) -> list[str]:
    """The vocabulary: specials, all bytes, then words (with the space before them)."""
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # SentencePiece grows a word piece by piece, so every prefix must be there
    words = dict.fromkeys(f"\u2581{word[:n]}" for word in WORDS for n in range(1, len(word) + 1))
    filler = [f"\u2581w{i}" for i in range(spec.n_vocab - len(fixed) - len(words))]
    return [*fixed, *words, *filler]


def weights(spec: TinySpec) -> dict[str, np.ndarray]:
    """Random weights, [out, in] as GGUF names them, float32."""
    rng = np.random.default_rng(spec.seed)
    perturb = np.random.default_rng(spec.seed + 1000)

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        values = rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)
        values += spec.noise * perturb.standard_normal((rows, columns)) / np.sqrt(columns)
        return values.astype(np.float32)

    d, f = spec.n_embd, spec.n_ff
    tensors = {"token_embd.weight": matrix(spec.n_vocab, d, 8.0)}
    for i in range(spec.n_layer):
        tensors[f"blk.{i}.attn_norm.weight"] = np.ones(d, np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"blk.{i}.{name}.weight"] = matrix(d, d, 1.0)
        tensors[f"blk.{i}.ffn_norm.weight"] = np.ones(d, np.float32)
        tensors[f"blk.{i}.ffn_gate.weight"] = matrix(f, d, 1.0)
        tensors[f"blk.{i}.ffn_up.weight"] = matrix(f, d, 1.0)
        tensors[f"blk.{i}.ffn_down.weight"] = matrix(d, f, 1.0)
    tensors["output_norm.weight"] = np.ones(d, np.float32)
    tensors["output.weight"] = matrix(spec.n_vocab, d, 2.0)
    return tensors


def write_tiny(path: Path, spec: TinySpec, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """Write a GGUF with `spec`'s weights, or the given ones."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(spec.n_ctx_train)
    writer.add_embedding_length(spec.n_embd)
    writer.add_block_count(spec.n_layer)
    writer.add_feed_forward_length(spec.n_ff)
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_head)
    writer.add_rope_dimension_count(spec.n_embd // spec.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    _finish(writer, spec, tensors or weights(spec))
    return path


def write_tiny_mamba(path: Path, spec: TinySpec) -> Path:
    """A recurrent model of `spec`'s width and vocabulary: its state cannot be shared."""
    rng = np.random.default_rng(spec.seed)
    d, inner, state, rank = spec.n_embd, 2 * spec.n_embd, 16, 4
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(spec.n_ctx_train)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(1)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {
        "token_embd.weight": (spec.n_vocab, d),
        "output_norm.weight": (d,),
        "blk.0.attn_norm.weight": (d,),
        "blk.0.ssm_in.weight": (2 * inner, d),
        "blk.0.ssm_conv1d.weight": (inner, 4),
        "blk.0.ssm_conv1d.bias": (inner,),
        "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank),
        "blk.0.ssm_dt.bias": (inner,),
        "blk.0.ssm_a": (inner, state),
        "blk.0.ssm_d": (inner,),
        "blk.0.ssm_out.weight": (d, inner),
    }
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tensors["blk.0.ssm_a"] = -np.abs(tensors["blk.0.ssm_a"])
    _finish(writer, spec, tensors)
    return path


def _finish(writer: gguf.GGUFWriter, spec: TinySpec, tensors: dict[str, np.ndarray]) -> None:
    """Vocabulary, tensors, and the file itself."""
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    names = pieces(spec)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-1.0 * i for i in range(len(names))])
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * 256
        + [kinds.NORMAL] * (len(names) - 259)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(spec.add_bos)
    writer.add_add_eos_token(spec.add_eos)
    if spec.template is not None:
        writer.add_chat_template(spec.template)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_logits(spec: TinySpec, ids: np.ndarray) -> np.ndarray:
    """Logits [n, n_vocab] of one sequence, in float64, written from the Llama paper alone."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in weights(spec).items()}
    n, n_head = len(ids), spec.n_head
    size = spec.n_embd // n_head
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)

    def rotate(x: np.ndarray) -> np.ndarray:  # [n, n_head, size], pairs (2i, 2i + 1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    hidden = tensors["token_embd.weight"][ids]
    for i in range(spec.n_layer):
        block = {
            name.removeprefix(f"blk.{i}.").removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"blk.{i}.")
        }
        x = norm(hidden)
        q, k, v = (
            (x @ block[name].T).reshape(n, n_head, size) for name in ("attn_q", "attn_k", "attn_v")
        )
        scores = np.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / np.sqrt(size)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", scores, v).reshape(n, -1)
        hidden = hidden + attended @ block["attn_output"].T
        x = norm(hidden)
        gate = x @ block["ffn_gate"].T
        hidden = (
            hidden + (gate / (1 + np.exp(-gate)) * (x @ block["ffn_up"].T)) @ block["ffn_down"].T
        )
    return norm(hidden) @ tensors["output.weight"].T


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities of rows."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def byte_ids(text: str) -> np.ndarray:
    """Token ids of a text without any of the vocabulary's words: one a byte, and the space that
    SentencePiece puts first (three bytes, as U+2581).
    """
    data = "\u2581".encode() + text.replace(" ", "\u2581").encode()
    return np.array([FIRST_BYTE + byte for byte in data], dtype=np.int32)


# One thread: with more, a model this small mostly waits at barriers, and for seconds where other
# processes hold the cores.
# TEST_LLAMA_DEVICE=cuda runs them on the GPUs of a llama-cpp-python that was built for them.
DEVICE = os.environ.get("TEST_LLAMA_DEVICE", "cpu")
ONE = Runtime(n_threads=1, n_gpu_layers=-1 if DEVICE == "cuda" else 0)

SPEC = TinySpec()
NOISY = replace(SPEC, noise=0.15)
TEXT = "".join(
    f"{i}. The cat sat on a mat and saw the dog run in the sun; it was {i * 37 % 101}!\n"
    for i in range(80)
)


@dataclass(frozen=True)
class TinyFiles:
    base: Path
    noisy: Path
    no_bos: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    folder = tmp_path_factory.mktemp("tiny")
    return TinyFiles(
        base=write_tiny(folder / "base.gguf", SPEC),
        noisy=write_tiny(folder / "noisy.gguf", NOISY),
        no_bos=write_tiny(folder / "no-bos.gguf", replace(SPEC, add_bos=False)),
    )


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command's main() on one thread and read its one JSON object."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        options = ("--threads", "1", "--device", DEVICE)
        status = main([*(str(argument) for argument in arguments), *options])
        out, err = capsys.readouterr()
        assert status == 0, err
        value: dict[str, Any] = json.loads(out)
        return value

    return run
