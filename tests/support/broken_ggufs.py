"""Broken and hostile GGUFs, made of a small whole one: fields of the header set to what they cannot
be, and bits flipped by a seed.

`python tests/support/broken_ggufs.py BASE FOLDER` reads names of cases from stdin (all when there
are none) and prints, as JSON, what became of each. Every case is opened in a fork of this
process, which is quick; what opens it is what `quantkit compare` and `--levels-from` use.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_HUGE = (2**31, 2**32, 2**60, 2**63, 2**64 - 1)
_TYPES = (*range(50), 1000, 2**31, 2**32 - 1)
_SETTINGS: dict[str, tuple[str, Sequence[float]]] = {
    "llama.block_count": ("<I", (0, 3, 10**6, 2**32 - 1)),
    "llama.embedding_length": ("<I", (0, 1, 97, 2**31, 2**32 - 1)),
    "llama.attention.head_count": ("<I", (0, 1, 2, 7, 2**32 - 1)),
    "llama.attention.head_count_kv": ("<I", (0, 2, 3, 2**31, 2**32 - 1)),
    "llama.context_length": ("<I", (0, 1, 2**32 - 1)),
    "llama.rope.dimension_count": ("<I", (0, 1, 31, 33, 2**31, 2**32 - 1)),
    "llama.feed_forward_length": ("<I", (0, 1, 2**32 - 1)),
    "tokenizer.ggml.bos_token_id": ("<I", (300, 2**31, 2**32 - 1)),
    "tokenizer.ggml.eos_token_id": ("<I", (300, 2**32 - 1)),
    "llama.attention.layer_norm_rms_epsilon": ("<f", (0.0, -1.0, float("nan"), float("inf"))),
    "llama.rope.freq_base": ("<f", (0.0, float("nan"), float("inf"))),
}


class Whole:
    """The bytes of a whole file and where its parts lie."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.keys: dict[str, tuple[int, int]] = {}  # where its length, and where its value begins
        self.tensors: dict[str, tuple[int, int, int]] = {}  # dimensions, how many, the type
        n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
        at = 24
        for _ in range(n_keys):
            begin, (name, at) = at, self._text(at)
            (kind,) = struct.unpack_from("<I", data, at)
            self.keys[name] = begin, at + 4
            at = self._skip(kind, at + 4)
        self.table = at
        for _ in range(n_tensors):
            name, at = self._text(at)
            (n,) = struct.unpack_from("<I", data, at)
            self.tensors[name] = at + 4, n, at + 4 + 8 * n
            at += 4 + 8 * n + 12
        self.end = at

    def _text(self, at: int) -> tuple[str, int]:
        (n,) = struct.unpack_from("<Q", self.data, at)
        return self.data[at + 8 : at + 8 + n].decode(), at + 8 + n

    def _skip(self, kind: int, at: int) -> int:
        if kind == 8:
            return self._text(at)[1]
        if kind != 9:
            return at + _WIDTHS[kind]
        item, n = struct.unpack_from("<IQ", self.data, at)
        at += 12
        if item != 8:
            return at + n * _WIDTHS[item]
        for _ in range(n):
            at = self._text(at)[1]
        return at

    def put(self, at: int, code: str, *values: float) -> bytes:
        data = bytearray(self.data)
        struct.pack_into(code, data, at, *values)
        return bytes(data)

    def with_keys(self, *pairs: tuple[bytes, int, bytes]) -> bytes:
        """More metadata, as key, kind and value; the tensors move with it."""
        more = b"".join(
            struct.pack("<Q", len(k)) + k + struct.pack("<I", t) + v for k, t, v in pairs
        )
        head = self.data[: self.table] + more + self.data[self.table : self.end]
        (n,) = struct.unpack_from("<Q", head, 16)
        head = head[:16] + struct.pack("<Q", n + len(pairs)) + head[24:]
        begin = self.end + -self.end % 32
        return head + bytes(-len(head) % 32) + self.data[begin:]


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def cases(data: bytes, n_flips: int = 150, seed: int = 1) -> dict[str, bytes]:
    """Every broken file by what is wrong with it."""
    whole = Whole(data)
    put = whole.put
    found = {
        "intact": data,
        "empty": b"",
        "magic": b"GGUX" + data[4:],
        "big endian": put(4, ">I", 3),
        "trailing bytes": data + bytes(10**6),
    }
    for n in (0, 1, 2, 999):
        found[f"version {n}"] = put(4, "<I", n)
    for n in (0, 1, *_HUGE):
        found[f"n_tensors {n}"], found[f"n_keys {n}"] = put(8, "<Q", n), put(16, "<Q", n)
    name, value = whole.keys["general.architecture"]
    for n in (0, *_HUGE):
        found[f"length of a key {n}"] = put(name, "<Q", n)
        found[f"length of a text {n}"] = put(value, "<Q", n)
    for kind in (9, 13, 255, 2**31):
        found[f"kind of a value {kind}"] = put(value - 4, "<I", kind)
    _, tokens = whole.keys["tokenizer.ggml.tokens"]
    for n in (0, 1, *_HUGE):
        found[f"items of an array {n}"] = put(tokens + 4, "<Q", n)
    for kind in (0, 9, 10, 13):
        found[f"kind of an array {kind}"] = put(tokens, "<I", kind)
    for what in ("blk.0.ffn_down.weight", "token_embd.weight", "output_norm.weight"):
        found |= _of_a_tensor(whole, what)
    found |= _added(whole)
    for key, (code, values) in _SETTINGS.items():
        for setting in values:
            found[f"{key} {setting}"] = put(whole.keys[key][1], code, setting)
    for n in (4, 24, 100, whole.table, whole.table + 10, whole.end, whole.end + 1, -1, -100_000):
        found[f"cut at {n}"] = data[:n]
    rng = random.Random(seed)
    for i in range(n_flips):
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            flipped[rng.randrange(whole.end)] ^= 1 << rng.randrange(8)
        found[f"flipped {i}"] = bytes(flipped)
    return found


def _of_a_tensor(whole: Whole, name: str) -> dict[str, bytes]:
    dims, n, kind = whole.tensors[name]
    found = {f"{name} type {t}": whole.put(kind, "<I", t) for t in _TYPES}
    for offset in (1, 32, 2**31, 2**63, 2**64 - 32, 2**64 - 1):
        found[f"{name} offset {offset}"] = whole.put(kind + 4, "<Q", offset)
    for many in (0, 5, 8, 255, 2**32 - 1):
        found[f"{name} dimensions {many}"] = whole.put(dims - 4, "<I", many)
    for width in (0, 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1):
        found[f"{name} width {width}"] = whole.put(dims, "<Q", width)
    for width in (2**32, 2**63):
        if n > 1:
            found[f"{name} {width} x {width}"] = whole.put(dims, "<QQ", width, width)
    return found


def _added(whole: Whole) -> dict[str, bytes]:
    """More metadata, and names."""
    deep = struct.pack("<IQ", 9, 1) * 100_000 + struct.pack("<IQ", 4, 0)
    loop = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    values: dict[str, tuple[bytes, int, bytes]] = {
        "alignment is text": (b"general.alignment", 8, text(b"32")),
        "alignment is an array": (b"general.alignment", 9, struct.pack("<IQ", 4, 0)),
        "deep arrays": (b"x", 9, deep),
        "2^40 arrays": (b"x", 9, struct.pack("<IQ", 9, 2**40)),
        "a key twice": (b"general.architecture", 8, text(b"llama")),
        "escape codes": (b"\x1b[2J\x1b]0;PWN\x07", 4, struct.pack("<I", 1)),
        "no UTF-8": (b"\xff\xfe", 4, struct.pack("<I", 1)),
        "NUL in a key": (b"a\0b", 4, struct.pack("<I", 1)),
        "experts": (b"llama.expert_count", 4, struct.pack("<I", 2**32 - 1)),
        "experts without tensors": (b"llama.expert_count", 4, struct.pack("<I", 8)),
        "a split": (b"split.count", 2, struct.pack("<H", 65_535)),
        "a split of 2": (b"split.count", 2, struct.pack("<H", 2)),
        "a vocabulary of its own": (b"llama.vocab_size", 4, struct.pack("<I", 2**31)),
        "keys of 0": (b"llama.attention.key_length", 4, struct.pack("<I", 0)),
        "keys of 2^31": (b"llama.attention.key_length", 4, struct.pack("<I", 2**31)),
        "an endless template": (b"tokenizer.chat_template", 8, text(loop)),
        "scaling by 0": (b"llama.rope.scaling.factor", 6, struct.pack("<f", 0.0)),
        "a window of 0": (b"llama.attention.sliding_window", 4, struct.pack("<I", 0)),
    }
    for n in (0, 1, 3, 7, 2**31, 2**32 - 1):
        values[f"alignment {n}"] = (b"general.alignment", 4, struct.pack("<I", n))
    found = {name: whole.with_keys(pair) for name, pair in values.items()}
    data = whole.data
    found["a tensor twice"] = data.replace(b"blk.1.ffn_down.weight", b"blk.0.ffn_down.weight")
    found["another name"] = data.replace(b"blk.1.ffn_down.weight", b"a" * 21)
    found["no pre-tokenizer"] = data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modeX")
    found["another architecture"] = data.replace(text(b"llama"), text(b"bert?"), 1)
    here, there = whole.tensors["token_embd.weight"][2], whole.tensors["blk.0.ffn_down.weight"][2]
    (offset,) = struct.unpack_from("<Q", data, there + 4)
    found["overlapping tensors"] = whole.put(here + 4, "<Q", offset)
    return found


def _read(path: Path) -> str:
    """What quantkit does with a stranger's file by itself."""
    from quantkit.errors import QuantkitError
    from quantkit.gguf_file.read import GgufFile
    from quantkit.gguf_file.sound import check_sound

    try:
        file = GgufFile(path)
        for name in file.tensors:
            file.packed(name)
        if file.n_elements < 10**8:
            for name in file.tensors:
                file.values(name)
        check_sound(file)
    except QuantkitError as error:
        assert "\x1b" not in str(error), "it would reach the terminal"
        return f"refused: {error}"
    return "read"


def _evaluate(path: Path) -> str:
    """What llama.cpp does with it: tokens, a batch, an answer."""
    import numpy as np

    from evaluators import generation, llama_runtime
    from evaluators.errors import EvaluationError

    runtime = llama_runtime.Runtime(1, launch=_Forked)
    try:
        with llama_runtime.Model(path, runtime) as model:
            ids = model.tokenize("Hello world, this is a test. " * 5)[:32]
            with llama_runtime.Context(model, 64, 64, 64) as context:
                n = len(ids)
                positions = np.arange(n, dtype=np.int32)
                float(context.decode(ids, positions, np.ones(n, np.int8)).sum())
        generation.answer(path, "Hello", 2, runtime)
    except EvaluationError as error:
        assert "\x1b" not in str(error), "it would reach the terminal"
        return f"refused: {error}"
    return "ran"


class _Forked:
    """A `Launch` for speed: a fork of this process, which has everything imported."""

    def __init__(self, descriptors: dict[str, int], readable: object, writable: object) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            try:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, 2)
                for descriptor in range(3, 64):
                    if descriptor not in descriptors.values():
                        os.closerange(descriptor, descriptor + 1)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
                from evaluators import serve

                serve._RENDER_SECONDS = 1
                serve.serve(**descriptors)
            finally:
                os._exit(1)

    def end(self) -> str:
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if not done:
            os.kill(self._pid, signal.SIGKILL)
            _, status = os.waitpid(self._pid, 0)
        return f"ended by signal {os.WTERMSIG(status)}"


def main(base: str, folder: str) -> None:
    import evaluators.serve  # before the forks
    from evaluators import llama_runtime

    llama_runtime._SECONDS = llama_runtime._RENDER_SECONDS = 15.0
    wanted = json.load(sys.stdin)
    found = cases(Path(base).read_bytes())
    path = Path(folder) / "case.gguf"
    for name in wanted or found:
        path.write_bytes(found[name])
        begun = time.monotonic()
        told = {"case": name, "read": _read(path), "run": _evaluate(path)}
        told["seconds"] = round(time.monotonic() - begun, 3)
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    assert evaluators.serve


if __name__ == "__main__":
    main(*sys.argv[1:])
