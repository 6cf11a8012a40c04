"""Choose the weight files of a checkpoint by the rule of transformers' `from_pretrained`.
Everything that reads weights uses this module, so that what transformers loads is what is
converted.

`model.safetensors` wins over an index next to it (fine-tunes are saved over base shards). An
index names files, and all of each is read, whatever tensors the index lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from quantkit.checkpoint.safetensors import StoredTensor, read_header
from quantkit.errors import QuantkitError
from quantkit.sandbox.untrusted import Settings

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def choose(
    model: str, present: Collection[str], read_index: Callable[[], Settings]
) -> tuple[str, ...]:
    """Return the files among those `present` that hold the model's weights, in the order they are
    read.

    `read_index` is only called where the index decides. Raises QuantkitError when it is malformed
    or names files that are not there. A name counts only if the listing has it: an index cannot
    point outside the model's folder.
    """
    if SINGLE in present:
        return (SINGLE,)
    index = read_index()
    weight_map = index.section("weight_map")
    if not weight_map:
        raise QuantkitError(
            f"{INDEX} of {model} lists no weights.", "Tell its author, or use another revision."
        )
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if not _is_plain(name)]
    if outside:
        raise QuantkitError(
            f"{INDEX} of {model} names {shown(outside[0])}, which is not a safetensors file in the"
            " model's folder.",
            "Check where the model came from.",
        )
    missing = [name for name in names if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise QuantkitError(
            f"{model} is incomplete: its index names {shown(missing[0])}{more}, which is missing.",
            "Download it again, use another revision, or tell its author.",
        )
    if not isinstance(index.get("metadata"), dict):
        raise QuantkitError(
            f'{INDEX} of {model} has no "metadata", and transformers refuses such an index.',
            'Add "metadata": {} to it in a local copy.',
        )
    return tuple(names)


def in_folder(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of the checkpoint in `folder`. Raises QuantkitError."""

    def read_index() -> Settings:
        try:
            return Settings.parse((folder / INDEX).read_bytes(), INDEX)
        except (OSError, QuantkitError):
            raise QuantkitError(
                f"{folder.name} has no {SINGLE} and no {INDEX} that can be read.",
                "Give a model with safetensors weights, as transformers lays them out.",
            ) from None

    present = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    return tuple(folder / name for name in choose(folder.name, present, read_index))


def stored(
    model: str, headers: Iterable[tuple[str, Iterable[StoredTensor]]]
) -> dict[str, tuple[str, StoredTensor]]:
    """Return the file and header entry of every tensor. Raises QuantkitError for one that two files
    hold: nothing says which of them counts.
    """
    found: dict[str, tuple[str, StoredTensor]] = {}
    for file, tensors in headers:
        for tensor in tensors:
            before = found.setdefault(tensor.name, (file, tensor))[0]
            if before != file:
                raise QuantkitError(
                    f"{shown(tensor.name)} of {model} is stored twice, in {before} and in {file}.",
                    "Remove one of them in a local copy, or use another revision.",
                )
    return found


def tensors_of(folder: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """Return the file and header entry of every tensor of the checkpoint in `folder`. Raises
    QuantkitError.
    """
    headers = [(path.name, read_header(path).tensors) for path in in_folder(folder)]
    found = stored(folder.name, headers)
    return {name: (folder / file, tensor) for name, (file, tensor) in found.items()}


_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def main_dtype(tensors: Iterable[StoredTensor]) -> str | None:
    """Return PyTorch's name of the type that most weights are stored in, whatever config.json says
    of it; None where no weight has one of the usual types.
    """
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in _TORCH_NAMES:
            counts[_TORCH_NAMES[tensor.dtype]] += tensor.n_elements
    return counts.most_common(1)[0][0] if counts else None


def few(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(shown(name) for name in names[:3]) + more


def shown(text: str) -> str:
    """Return a name that a stranger chose, made printable and short enough for a sentence."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= 100 else clean[:99] + "…"


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and PurePosixPath(name).name == name
