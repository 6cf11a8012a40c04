"""What the test Hub stores, and tiny models to put there."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_LFS = re.compile(r"\.(gguf|safetensors|bin|dat|parquet|arrow|gz|pt|png)$")


@dataclass(frozen=True)
class Blob:
    """One version of a file. Large local files stay on disk."""

    content: bytes | Path
    lfs: bool

    @property
    def data(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    @property
    def n_bytes(self) -> int:
        is_bytes = isinstance(self.content, bytes)
        return len(self.content) if is_bytes else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        data = f"{pointer}size {self.n_bytes}\n".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users who accepted the terms
    extra: dict[str, Any] = field(default_factory=dict)  # fields of the model's JSON
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> sha

    def commit(self, message: str, files: Mapping[str, Blob], branch: str = "main") -> Commit:
        text = f"{self.kind}{self.id}{len(self.commits)}{message}{sorted(files)}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), message, dict(files))
        self.commits.append(commit)
        self.refs[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit | None:
        sha = self.refs.get(revision, revision)
        return next((c for c in self.commits if c.sha == sha), None)

    @property
    def head(self) -> Commit:
        return next(c for c in self.commits if c.sha == self.refs["main"])


def is_large(path: str, content: bytes | Path | int) -> bool:
    """Whether the Hub keeps a file of this name and content (or size) in LFS."""
    if isinstance(content, Path):
        content = content.stat().st_size
    n_bytes = content if isinstance(content, int) else len(content)
    return bool(_LFS.search(path)) or n_bytes > 10_000_000


def tree_entry(path: str, blob: Blob) -> dict[str, Any]:
    """A file as tree and paths-info list it."""
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": blob.n_bytes,
        "oid": blob.git_oid,
    }
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.n_bytes, "pointerSize": 130}
    return entry


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file of name -> (dtype, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(t[2] for t in tensors.values())


def bf16(n: int, seed: int = 0) -> bytes:
    """`n` finite bfloat16 numbers."""
    numbers = np.random.default_rng(seed).standard_normal(n, np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
CARD = """---
license: apache-2.0
language: [en, fr]
base_model: someone/base
tags: [chat]
---
# Tiny
"""


def tiny_weights() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Those of CONFIG: 152 parameters in BF16 and 4 in F32."""
    projections = [f"self_attn.{name}_proj" for name in "qkvo"]
    projections += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    block = {f"{name}.weight": (4, 4) for name in projections}
    block |= {f"{name}_layernorm.weight": (4,) for name in ("input", "post_attention")}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, 4)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in block.items()}
    weights = {n: ("BF16", s, bf16(math.prod(s), i)) for i, (n, s) in enumerate(shapes.items())}
    norm = ("F32", (4,), np.ones(4, np.float32).tobytes())
    return {**weights, "model.norm.weight": norm}


def tiny_model(**replaced: bytes | str | dict[str, Any] | None) -> dict[str, bytes]:
    """Files of a model with 156 parameters. `name__ext=` replaces name.ext, None leaves it out."""
    files: dict[str, Any] = {
        "config.json": CONFIG,
        "model.safetensors": safetensors(tiny_weights()),
        "tokenizer.json": {"version": "1.0"},
        "README.md": CARD,
        "modeling_tiny.py": "raise SystemExit('never run')",
        "pytorch_model.bin": b"pickle",
        "tiny-Q4_K_M.gguf": b"GGUF",
        "original/params.json": "{}",
    }
    files |= {name.replace("__", "."): content for name, content in replaced.items()}
    return {name: _as_bytes(content) for name, content in files.items() if content is not None}


def _as_bytes(content: bytes | str | dict[str, Any]) -> bytes:
    if isinstance(content, dict):
        return json.dumps(content).encode()
    return content.encode() if isinstance(content, str) else content


def sharded_model(n_shards: int = 3) -> dict[str, bytes]:
    """The same model in `n_shards` files, with an index."""
    names = [f"model-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)]
    tensors = list(tiny_weights().items())
    files = {name: safetensors(dict(tensors[i::n_shards])) for i, name in enumerate(names)}
    homes = {tensor: name for i, name in enumerate(names) for tensor, _ in tensors[i::n_shards]}
    index = {"metadata": {}, "weight_map": homes}
    whole = tiny_model(model__safetensors=None)
    return {**whole, **files, "model.safetensors.index.json": json.dumps(index).encode()}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files in a folder of this machine."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
