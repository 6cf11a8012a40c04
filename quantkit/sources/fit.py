"""Check from headers alone that a checkpoint's weights are those of the model that its config.json
makes: before a weight is downloaded, with transformers' own loader as the only judge.

A tensor that lacks or has another shape is refused by name: transformers would draw it at random.
One that transformers does not read is left out of the GGUF too, and said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from quantkit import sandbox
from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.quantized import PACKED_PARTS
from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.checkpoint.weight_files import few, shown, tensors_of
from quantkit.errors import QuantkitError
from quantkit.sources.metadata import Stored, stored_values, values_in

_OTHER_REVISION = "Use another revision, or tell the model's author."
# Settings that give the sizes of the tensors that end so.
_SIZED_BY = {
    "vocab_size": r"(embed_tokens|wte|word_embeddings|embeddings|lm_head|embed_out|head)\.weight$",
    "intermediate_size": r"(mlp|feed_forward)\.\w+\.weight$",
    "hidden_size": r"(norm\w*|ln_\w+|embed_tokens|wte|word_embeddings)\.weight$",
}
_CHUNK = 1 << 20
_N_SAMPLES = 8  # places of a matrix that are read where all of it would be a download
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Fit:
    """A checkpoint that transformers loads whole.

    `tied` are stored tensors that the config says are another one: (name, of). `widths` are those
    of every block: columns -> rows of its largest weight.
    """

    unread: tuple[str, ...]  # stored, and not part of the model
    tied: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    widths: tuple[dict[int, int], ...]


class Report(TypedDict):
    """The answer of `quantkit.sources.expected.compare`."""

    model: str
    missing: list[str]
    mismatched: list[tuple[str, list[int], list[int]]]
    failed: list[str]
    odd_types: list[str]
    unread: list[str]
    unread_targets: list[str]
    tied: list[tuple[str, str]]
    head: str
    blocks: str
    n_blocks: int
    widths: list[list[tuple[int, int]]]
    activation: tuple[str, str, str] | None


def check_fit(folder: Path) -> Fit:
    """Look at the checkpoint in `folder`, whose weights may be shells (`sources.fetch_metadata`).

    Raises QuantkitError, naming tensors and settings, for what transformers would not load whole.
    """
    try:
        report = sandbox.call(
            "quantkit.sources.expected:compare",
            {"folder": str(folder.absolute())},
            limits=_LIMITS,
            readable=(folder,),
            shape=Report,
            preload=True,
        )
    except sandbox.Crashed as error:
        raise QuantkitError(
            "transformers cannot make a model from this config.json within"
            f" {_LIMITS.memory_bytes / 2**30:g} GiB and {_LIMITS.cpu_seconds} seconds: the process"
            f" {error.reason}.",
            "Look for numbers in config.json that are not this model's.",
        ) from None
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return judge(report, config, {name: t for name, (_, t) in tensors_of(folder).items()})


# Of names and shapes: the largest models (700B, 45,000 tensors) take 0.6 GB and 15 seconds.
_LIMITS = sandbox.Limits(
    cpu_seconds=180, wall_seconds=600, memory_bytes=3 * 2**30, file_bytes=2**20
)


def judge(report: Report, config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> Fit:
    """Return what `quantkit.sources.expected.compare` found, as a Fit. Raises QuantkitError."""
    for refusal in _refusals(report, config, tensors):
        raise refusal
    unread = tuple(report["unread"])
    notes = []
    if unread:
        one = len(unread) == 1
        notes.append(
            f"{few(unread)} {'is' if one else 'are'} stored but not part of"
            f" {shown(report['model'])}: transformers does not read {'it' if one else 'them'}, and"
            f" {'it is' if one else 'they are'} left out."
        )
    widths = tuple({int(n): int(rows) for n, rows in block} for block in report["widths"])
    tied = tuple((str(copy), str(of)) for copy, of in report["tied"])
    return Fit(unread, tied, tuple(notes), widths)


def _refusals(
    report: Report, config: Mapping[str, object], tensors: Mapping[str, StoredTensor]
) -> Iterator[QuantkitError]:
    """The most telling first."""
    missing, unread = list(report["missing"]), list(report["unread"])
    packed = [n for n in unread if n.rpartition(".")[2] in PACKED_PARTS]
    packed += [n for n, t in tensors.items() if t.dtype.startswith(("F8", "F4", "F6"))]
    if packed and not config.get("quantization_config"):
        yield QuantkitError(
            f"{few(packed)} {'is' if len(packed) == 1 else 'are'} stored as in a quantized model,"
            " and config.json does not say how it is quantized.",
            "Restore quantization_config in a local copy's config.json.",
        )
    n_stored = _n_blocks(report, [*report["unread_targets"]])
    if n_stored > report["n_blocks"]:
        yield _wrong_number(n_stored, report["n_blocks"])
    n_whole = _first_lacking_block(report, missing)
    if n_whole is not None:
        yield _wrong_number(n_whole, report["n_blocks"])
    # The table first: the head and others have its rows.
    for name, stored, made in sorted(report["mismatched"], key=lambda m: "embed" not in m[0]):
        yield _mismatch(name, stored, made, config)
    head = f"{report['head']}.weight"
    if report["head"] and missing == [head]:
        yield QuantkitError(
            "config.json says that the output head is not the table of embeddings"
            f" (tie_word_embeddings is false), and no {head} is stored.",
            "If the model was trained with the two tied, set tie_word_embeddings to true in a local"
            " copy's config.json.",
        )
    if missing or report["failed"]:
        yield QuantkitError(
            f"The checkpoint lacks {few([*missing, *report['failed']])}.", _OTHER_REVISION
        )
    if report["activation"]:
        key, asked, own = report["activation"]
        yield QuantkitError(
            f"config.json says {shown(key)} {shown(asked)}, and llama.cpp computes {shown(own)} for"
            f" every {shown(report['model'])}.",
            "The GGUF would be another model: use the original, or a checkpoint that says so.",
        )
    odd = [n for n in report["odd_types"] if tensors.get(n) is not None]
    if odd:
        yield QuantkitError(
            f"{shown(odd[0])} is stored as {shown(tensors[odd[0]].dtype)}, which is not a type of"
            " weights.",
            _OTHER_REVISION,
        )
    empty = [name for name, t in tensors.items() if not t.n_elements and name not in unread]
    if empty:
        yield QuantkitError(f"{few(empty)} has no values.", _OTHER_REVISION)


def _wrong_number(stored: int, said: int) -> QuantkitError:
    return QuantkitError(
        f"The checkpoint has {stored} blocks, but config.json says num_hidden_layers {said}.",
        "Correct it in a local copy's config.json, or use another revision.",
    )


def _n_blocks(report: Report, names: Sequence[str]) -> int:
    """One more than the highest number of a block among names."""
    number = re.compile(re.escape(report["blocks"]) + r"\.(\d+)\.")
    found = (number.match(name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _first_lacking_block(report: Report, missing: Sequence[str]) -> int | None:
    """How many blocks are there, when all that lacks is everything of the last ones."""
    number = re.compile(re.escape(report["blocks"]) + r"\.(\d+)\.")
    matches = [number.match(name) for name in missing]
    lacking = {int(match[1]) for match in matches if match}
    n, first = report["n_blocks"], min(lacking, default=0)
    if not missing or not all(matches) or first == 0 or max(lacking) != n - 1:
        return None
    if len(lacking) != n - first:
        return None
    parts = {i: 0 for i in lacking}
    for match in matches:
        parts[int(match[1])] += 1  # type: ignore[index]
    return first if min(parts.values()) >= 6 and len(set(parts.values())) == 1 else None


def _mismatch(
    name: str, stored: Sequence[int], made: Sequence[int], config: Mapping[str, object]
) -> QuantkitError:
    axis = next((i for i, (a, b) in enumerate(zip(stored, made, strict=False)) if a != b), 0)
    inner = [value for value in config.values() if isinstance(value, dict)]
    wrong = made[axis] if axis < len(made) else None
    for key, pattern in _SIZED_BY.items():
        if any(part.get(key) == wrong for part in [config, *inner]) and re.search(pattern, name):
            what = ("rows", "columns")[axis] if axis < 2 and len(made) > 1 else "values"
            short = name.removesuffix(".weight").rpartition(".")[2]
            sentence = (
                f"{shown(short)} has {stored[axis]} {what}, but config.json says {key} {wrong}."
            )
            break
    else:
        sentence = (
            f"{shown(name)} is stored as {_times(stored)}, but config.json makes it {_times(made)}."
        )
    return QuantkitError(sentence, "Correct config.json in a local copy, or use another revision.")


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def copies(tied: Sequence[tuple[str, str]], info: ModelInfo, token: str | None) -> list[str]:
    """Return the `tied` tensors that are copies of what they are tied to. If a stored head differs
    from the table that config.json ties it to, transformers uses both, and so does the GGUF.

    Of a model on the Hub some places are compared, of a folder every byte.
    """
    if not tied:
        return []
    values = stored_values(info, token)
    return [copy for copy, of in tied if _is_copy(values, copy, of, bool(info.local_path))]


def kept_notes(tied: Sequence[tuple[str, str]], copied: Collection[str]) -> list[str]:
    """Return what is said of `tied` tensors that are none of the copies."""
    return [
        f"{shown(copy)} differs from {shown(of)}, though config.json ties them:"
        " transformers uses both, and so does the GGUF."
        for copy, of in tied
        if copy not in copied
    ]


def copies_in(folder: Path, tied: Sequence[tuple[str, str]]) -> list[str]:
    """Return the names of `tied` that are copies in the checkpoint in `folder`, comparing every
    byte.
    """
    if not tied:
        return []
    values = values_in(folder)
    return [copy for copy, of in tied if _is_copy(values, copy, of, whole=True)]


def _is_copy(values: Stored, name: str, of: str, whole: bool) -> bool:
    tensors, read = values
    one, other = tensors.get(name), tensors.get(of)
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    n_bytes = one.n_bytes
    if whole:
        places = [(at, min(_CHUNK, n_bytes - at)) for at in range(0, n_bytes, _CHUNK)]
    else:
        n = min(_SAMPLE, n_bytes)
        places = [((n_bytes - n) * i // (_N_SAMPLES - 1), n) for i in range(_N_SAMPLES)]
    return all(read(name, at, n) == read(of, at, n) for at, n in dict.fromkeys(places))
