"""Time how long a model takes to write its calibration text, at the shapes of Gemma 3 270M.

    python benchmarks/written_text.py [--device cuda] [--texts 1,128,512,1024] [--tokens 192]

Random weights, 640 wide, 18 layers, 262,144 tokens of vocabulary, in bfloat16 on a GPU. Prints a
row for every number of texts that are written side by side: seconds, seconds of a step, tokens per
second, peak memory of the GPU, and whether a second time gave the same texts. The last row is all
that `standard` has the model write, as `Writer` does it: prose, prose in 15 languages, questions
and answers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from quantkit.calibration.sampling import Prompt, Writer, continue_batch, openings, texts_at_once

N_VOCAB = 262_144
# Texts of `standard` and the mix `builtin`, where a model knows 15 languages.
PROSE, LANGUAGES, DIALOGUES = 320, 15 * 26, 200


class Tokenizer:
    """Bytes as tokens: what a text says does not matter here."""

    eos_token_id = 1

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[2, *text.encode()])

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def make_model(device: str) -> Any:
    """Make the model with random weights, steep enough that texts differ."""
    config = Gemma3TextConfig(
        vocab_size=N_VOCAB,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = Gemma3ForCausalLM(config).to(dtype)
    return model.eval()


def timed(device: str, work: Callable[[], list[str]]) -> tuple[list[str], float, float]:
    """Return what was written, the seconds, and the peak of the GPU's memory in GiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    texts = work()
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return texts, seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--texts", default="1,128,512,1024", help="numbers of texts of a batch")
    parser.add_argument("--tokens", type=int, default=192, help="new tokens of a text")
    given = parser.parse_args()
    model, tokenizer, starts = make_model(given.device), Tokenizer(), openings()

    def write(n: int) -> list[str]:
        prompts = [Prompt(starts[i % len(starts)], (0, i)) for i in range(n)]
        return continue_batch(model, tokenizer, prompts, given.tokens)

    write(1)  # warms up
    print(f"a batch has {texts_at_once(model, 2 * given.tokens)} texts at most")
    print("texts  seconds  ms/step  tokens/s  peak GiB  same again")
    for n in map(int, given.texts.split(",")):
        texts, seconds, peak = timed(given.device, lambda n=n: write(n))  # type: ignore[misc]
        step, rate = 1000 * seconds / given.tokens, n * given.tokens / seconds
        same = texts == write(n)
        print(f"{n:5d}  {seconds:7.2f}  {step:7.2f}  {rate:8.0f}  {peak:8.2f}  {same}", flush=True)

    def everything() -> list[str]:
        writer = Writer(model, tokenizer, 0, lambda done, total, message: None)
        free, turns = PROSE + LANGUAGES, [Prompt("user: ", (1, i)) for i in range(DIALOGUES)]
        (texts,) = writer.free_texts([("prose", starts, free)], given.tokens)
        texts += writer.continued(turns, given.tokens // 3, "questions")
        return texts + writer.continued(turns, given.tokens, "answers")

    if given.device == "cuda":
        texts, seconds, peak = timed(given.device, everything)
        print(f"all that `standard` asks for: {len(texts)} texts, {seconds:.1f} s, {peak:.2f} GiB")


if __name__ == "__main__":
    main()
