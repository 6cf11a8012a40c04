"""Time opening a GGUF with a large vocabulary, its parts, and laying out a file like it.

    python benchmarks/open_gguf.py [--tokens 262144] [--merges 515000] [FILE]

Without FILE a header is made that has such a vocabulary: texts of 1 to 30 bytes, some of them
without a byte of ASCII, some above 255 bytes. Prints the best of five, in CPU seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gguf
import numpy as np

from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.gguf_file.write import lay_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--merges", type=int, default=515_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or write(Path(folder) / "a.gguf", options.tokens, options.merges)
        file = GgufFile(path)
        texts = [f for f in file.fields.values() if f.item == gguf.GGUFValueType.STRING]
        print(f"{sum(f.n_items for f in texts):,} texts, {len(file.tensors):,} tensors")
        print(f"open      {best(lambda: GgufFile(path)):.4f} s")
        print(f"check     {best(lambda: check_sound(file)):.4f} s")
        print(f"lay out   {best(lambda: lay_out(file, {})):.4f} s")
        print(f"decode    {best(lambda: [GgufFile(path).metadata[f.name] for f in texts]):.4f} s")


def best(work: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def write(path: Path, n_tokens: int, n_merges: int) -> Path:
    rng = random.Random(0)
    letters = ["abcdefghijklmnopqrstuvwxyz ", "абвгдежзийклмнопрстуфхцчшщ", "日本語中文字"]
    tokens = [
        "".join(rng.choices(letters[i % 8 % 3 if i % 8 < 3 else 0], k=rng.randint(1, 10)))
        for i in range(n_tokens)
    ]
    tokens[100:130] = [" " * n for n in range(250, 280)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(18)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * n_tokens)
    writer.add_token_scores([0.0] * n_tokens)
    writer.add_token_merges(
        [f"{a} {b}" for a, b in zip(*(rng.choices(tokens, k=n_merges) for _ in "ab"), strict=True)]
    )
    writer.add_tensor("token_embd.weight", np.zeros((n_tokens, 32), np.float16))
    for i in range(18):
        for name in "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.zeros((32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    main()
