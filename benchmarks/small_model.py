"""Train a small Llama or Mixtral of any width on the documentation and library of this Python.

    python benchmarks/small_model.py OUT --width 640 [--minutes 3] [--device cuda]
    python benchmarks/small_model.py OUT --width 256 --inner 256 --layers 4 --experts 32 --chosen 4

OUT gets the checkpoint and `eval.txt`, text that it was not trained on. Random weights say nothing
of a quantizer: a trained model's are correlated and so are its activations.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "tests" / "support"))

import torch
from tiny_models import N_TOKENS, save_model, write_tokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from quantkit.calibration.sources import builtin_text
from quantkit.model.blockwise import compute_dtype

N_CTX = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=0, help="of every layer; 0: a Llama")
    parser.add_argument("--chosen", type=int, default=2, help="experts that see a token")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.out, trust_remote_code=False)
    domains = [builtin_text(name, 8_000_000) for name in ("docs", "code")]
    texts = [text for domain in domains if domain is not None for text in domain.documents]
    random.Random(1).shuffle(texts)
    n_eval = len(texts) // 20
    (options.out / "eval.txt").write_text("\n\n".join(texts[:n_eval])[:200_000], "utf-8")
    stream = [i for text in texts[n_eval:] for i in tokenizer(text, verbose=False).input_ids]
    ids = torch.tensor(stream, device=options.device)
    model = make_model(options).to(options.device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, {len(ids):,} tokens of text", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / (60 * options.minutes)) < 1:
        rate = 1e-3 * min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(0, len(ids) - N_CTX, (options.batch,)).tolist()
        batch = torch.stack([ids[a : a + N_CTX] for a in at])
        is_fast = compute_dtype(options.device) == torch.bfloat16  # a CPU may only emulate it
        with torch.autocast(options.device, torch.bfloat16, enabled=is_fast):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {100 * done:.0f} %", flush=True)
        step += 1
    save_model(options.out, model.to("cpu", torch.bfloat16), "spm")
    print(f"{step} steps, loss {loss.item():.3f}")


def make_model(options: argparse.Namespace) -> PreTrainedModel:
    """Random weights of the asked shapes."""
    shapes = {
        "vocab_size": N_TOKENS["spm"],
        "hidden_size": options.width,
        "intermediate_size": options.inner,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64,
        "num_key_value_heads": max(1, options.width // 64 // 5),
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if not options.experts:
        return LlamaForCausalLM(LlamaConfig(**shapes, tie_word_embeddings=True))
    experts = {"num_local_experts": options.experts, "num_experts_per_tok": options.chosen}
    return MixtralForCausalLM(
        MixtralConfig(**shapes, **experts, output_router_logits=True, tie_word_embeddings=False)
    )


if __name__ == "__main__":
    main()
