"""Trouble with files and vocabularies: shards, indexes, tokens, templates. See `trouble.py`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from trouble import EITHER, REFUSED, RIGHT, Draft, Tensors, oddity, sound_draft

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def halves(draft: Draft) -> list[Tensors]:
    names = sorted(draft.tensors)
    cut = len(names) // 2
    parts = (names[:cut], names[cut:])
    return [{name: draft.tensors[name] for name in part} for part in parts]


@oddity(RIGHT, "files")
def shards(rng: random.Random, draft: Draft) -> str:
    draft.shards = halves(draft)
    return ""


@oddity(RIGHT, "files")
def renamed_shards(rng: random.Random, draft: Draft) -> str:
    draft.shards = halves(draft)
    draft.shard_names = ["weights_a.safetensors", "z-last.safetensors"]
    return ""


@oddity(RIGHT, "files")
def stale_shards_beside_a_single_file(rng: random.Random, draft: Draft) -> str:
    """A fine-tune beside its base: model.safetensors is what transformers reads."""
    base = {n: t + torch.randn(t.shape).to(t.dtype) for n, t in draft.tensors.items() if n[-1]}
    stale = Draft(draft.kind, base, {}, {}, {}, shards=None)
    stale.shards = halves(stale)
    stale._put_shards()
    draft.files |= stale.files
    return ""


@oddity(RIGHT, "files")
def stale_shard_beside_an_index(rng: random.Random, draft: Draft) -> str:
    from safetensors.torch import save

    draft.shards = halves(draft)
    old = {name: torch.randn(t.shape).bfloat16() for name, t in draft.shards[0].items()}
    name = rng.choice(("model-00001-of-00003.safetensors", "consolidated.safetensors"))
    draft.put(name, save(old, {"format": "pt"}))
    return name


@oddity(EITHER, "files")
def tensor_in_two_shards(rng: random.Random, draft: Draft) -> str:
    draft.shards = halves(draft)
    name = rng.choice(sorted(draft.shards[0]))
    draft.shards[1][name] = torch.randn(draft.tensors[name].shape).to(draft.tensors[name].dtype)
    if rng.random() < 0.5:
        draft.index[name] = "model-00001-of-00002.safetensors"
    return name


@oddity(REFUSED, "files")
def shard_that_is_not_there(rng: random.Random, draft: Draft) -> str:
    draft.shards = halves(draft)
    gone = rng.choice(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))
    draft.last.append(lambda folder: (folder / gone).unlink())
    return gone


@oddity(EITHER, "files")
def index_names_another_shard(rng: random.Random, draft: Draft) -> str:
    draft.shards = halves(draft)
    name = rng.choice(sorted(draft.shards[0]))
    draft.index[name] = "model-00002-of-00002.safetensors"
    return name


@oddity(EITHER, "files")
def index_lacks_a_tensor(rng: random.Random, draft: Draft) -> str:
    draft.shards = halves(draft)
    name = rng.choice(sorted(draft.shards[0]))

    def drop(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"][name]
        path.write_text(json.dumps(index))

    draft.last.append(drop)
    return name


@oddity(REFUSED, "files")
def shards_without_an_index(rng: random.Random, draft: Draft) -> str:
    draft.shards, draft.has_index = halves(draft), False
    return ""


@oddity(REFUSED, "files")
def another_file_name(rng: random.Random, draft: Draft) -> str:
    draft.single = rng.choice(("weights.safetensors", "pytorch_model.safetensors"))
    return draft.single


@oddity(RIGHT, "files")
def pickles_beside(rng: random.Random, draft: Draft) -> str:
    draft.put("pytorch_model.bin", b"\x80\x04.")
    draft.put("training_args.bin", b"\x80\x04.")
    return ""


@oddity(REFUSED, "broken")
def cut_file(rng: random.Random, draft: Draft) -> str:
    n = rng.choice((1, 100, 5000))

    def cut(folder: Path) -> None:
        path = next(iter(sorted(folder.glob("*.safetensors"))))
        path.write_bytes(path.read_bytes()[:-n])

    if draft.single != "model.safetensors":
        return None  # type: ignore[return-value]
    draft.last.append(cut)
    return f"{n} bytes"


# Names.


@oddity(EITHER, "names")
def other_prefix(rng: random.Random, draft: Draft) -> str:
    before, after = rng.choice(
        (("model.", ""), ("model.", "model.model."), ("", "module."), ("", "base_model.model."))
    )
    renamed = {}
    for name, tensor in draft.tensors.items():
        renamed[after + name.removeprefix(before) if name.startswith(before) else name] = tensor
    draft.tensors = renamed
    return f"{before!r} -> {after!r}"


@oddity(EITHER, "names")
def tensor_under_two_names(rng: random.Random, draft: Draft) -> str | None:
    name = rng.choice(sorted(n for n in draft.tensors if n.startswith("model.layers.")))
    tensor = draft.tensors[name]
    draft.tensors[name.removeprefix("model.")] = torch.randn(tensor.shape).to(tensor.dtype)
    return name


# The vocabulary.


def resize(draft: Draft, n: int) -> None:
    """Give the tables n rows; new ones are random."""
    for name in _TABLES:
        table = draft.tensors.get(name)
        if table is not None:
            more = torch.randn(max(0, n - len(table)), table.shape[1]) * table.float().std()
            draft.tensors[name] = torch.cat([table, more.to(table.dtype)])[:n]
    draft.config["vocab_size"] = n


def add_tokens(draft: Draft, tokens: list[Any]) -> None:
    """As transformers does: tokenizer.json beside tokenizer.model and tokenizer_config.json."""
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in draft.files.items():
            if file.startswith(("tokenizer", "special")):
                (folder / file).write_bytes(data)
        plain = {"model_type": sound_draft(draft.kind).config["model_type"]}
        (folder / "config.json").write_text(json.dumps(plain))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(folder / "new")
        for path in (folder / "new").iterdir():
            draft.files[path.name] = path.read_bytes()


@oddity(RIGHT, "vocabulary")
def added_tokens(rng: random.Random, draft: Draft) -> str:
    from tokenizers import AddedToken

    special = rng.random() < 0.7
    names = ["<|im_start|>", "<|im_end|>", "<tool_call>"][: rng.choice((1, 2, 3))]
    add_tokens(draft, [AddedToken(n, special=special, normalized=False) for n in names])
    n_old = draft.config["vocab_size"]
    resize(draft, n_old + len(names) + rng.choice((0, 0, 5)))
    return f"{len(names)}{' special' if special else ''}, {draft.config['vocab_size']} rows"


@oddity(EITHER, "vocabulary")
def tokens_without_rows(rng: random.Random, draft: Draft) -> str:
    from tokenizers import AddedToken

    add_tokens(draft, [AddedToken("<|extra|>", special=True)])
    return ""


@oddity(RIGHT, "vocabulary")
def padded_table(rng: random.Random, draft: Draft) -> str:
    n = int(draft.config["vocab_size"]) + rng.choice((1, 7, 64))
    resize(draft, n)
    return f"{n} rows"


@oddity(REFUSED, "vocabulary")
def rows_beyond_the_config(rng: random.Random, draft: Draft) -> str:
    n = int(draft.config["vocab_size"])  # another oddity may have made it 512.0
    resize(draft, n + 8)
    draft.config["vocab_size"] = n
    return ""


@oddity(EITHER, "vocabulary")
def odd_added_token(rng: random.Random, draft: Draft) -> str:
    """A word of the vocabulary once more, a token with spaces, one that is one letter."""
    from tokenizers import AddedToken

    name = rng.choice(("the", " spaced out ", "a", "\n\n", "<unk>", "\u0301", "🙂"))
    side = rng.choice(({}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}))
    add_tokens(draft, [AddedToken(name, normalized=rng.random() < 0.5, **side)])
    resize(draft, draft.config["vocab_size"] + 1)
    return f"{name!r} {side}"


@oddity(REFUSED, "vocabulary")
def no_tokenizer(rng: random.Random, draft: Draft) -> str:
    for name in [n for n in draft.files if n.startswith("tokenizer")]:
        del draft.files[name]
    return ""


@oddity(REFUSED, "vocabulary")
def broken_tokenizer(rng: random.Random, draft: Draft) -> str:
    name = "tokenizer.json" if "tokenizer.json" in draft.files else "tokenizer.model"
    draft.files[name] = draft.files[name][: len(draft.files[name]) // 2]
    return name


@oddity(RIGHT, "ends")
def several_ends(rng: random.Random, draft: Draft) -> str:
    ends = rng.choice(([2, 300], [300, 2], [2, 300, 301], [2]))
    for settings in (draft.config, draft.generation)[rng.choice((0, 0, 1)) :]:
        settings["eos_token_id"] = ends
    return str(ends)


@oddity(EITHER, "ends")
def odd_end(rng: random.Random, draft: Draft) -> str:
    value = rng.choice((None, 10**6, -1, "</s>", [], [2, 10**6], 2.0))
    draft.config["eos_token_id"] = value
    draft.generation["eos_token_id"] = value
    return repr(value)


@oddity(EITHER, "ends")
def other_specials(rng: random.Random, draft: Draft) -> str:
    changes: dict[str, Any] = rng.choice(
        (
            {"bos_token": "</s>", "eos_token": "<s>"},
            {"add_bos_token": False},
            {"add_eos_token": True},
            {"bos_token": None},
            {"pad_token": "<nowhere>"},
            {"eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}},
            {"model_max_length": 10**30},
            {"tokenizer_class": "NoSuchTokenizer"},
            {"tokenizer_class": None},
            {"added_tokens_decoder": {"600": {"content": "<x>", "special": True}}},
        )
    )
    draft.put_json("tokenizer_config.json", **changes)
    return str(changes)


@oddity(RIGHT, "template")
def chat_template(rng: random.Random, draft: Draft) -> str:
    """Good, absent, broken or hostile: none of them is in the way of a file."""
    texts = {
        "good": "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}",
        "broken": "{% for m in messages %}{{ m['content'] }",
        "a loop": "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
        "a huge text": "{{ 'x' * 10**10 }}",
        "hostile": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "raises": "{{ raise_exception('only pairs') }}",
        "no text": 7,
    }
    name = rng.choice(sorted(texts))
    draft.put_json("tokenizer_config.json", chat_template=texts[name])
    return name
