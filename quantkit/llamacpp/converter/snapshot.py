"""A copy of a model's snapshot that holds nothing that could run.

llama.cpp's converter passes `trust_remote_code=True` to transformers. Here that finds nothing to
trust: no Python file is copied, `auto_map` (which names files and repositories to load code from)
is removed from every JSON at any depth, pickles stay behind, and weights are links to the files
that were checked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.quantized import is_stale, without_quantization
from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.checkpoint.weight_files import INDEX, tensors_of
from quantkit.errors import QuantkitError
from quantkit.hub.card_data import read_card
from quantkit.sandbox.untrusted import Settings

# Kinds of files that the converter reads, with the largest that is accepted. Anything else stays
# behind. Tokenizers of 260k entries are JSON files of 33 MB; an index of 100k tensors has 9 MB.
_MIB = 2**20
_KINDS = {
    ".json": 128 * _MIB,
    ".jsonl": 64 * _MIB,  # PLaMo's vocabulary
    ".txt": 32 * _MIB,
    ".jinja": 4 * _MIB,
    ".md": 4 * _MIB,
    ".model": 64 * _MIB,  # SentencePiece
    ".v3": 64 * _MIB,  # tokenizer.model.v3
    ".tiktoken": 64 * _MIB,
}
# What a model cannot be converted without; of others a broken one just stays behind.
_NEEDED = re.compile(
    r"(config|generation_config|params|tekken|special_tokens_map|added_tokens|.*processor_config"
    r"|(tokenizer|vocab|merges|chat_template).*|.*\.index)\.\w+(\.v3)?"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_CONFIG_BYTES = 16 * _MIB  # every JSON but the tokenizer's and the index


@dataclass(frozen=True)
class Snapshot:
    """The sanitized copy and what was done to make it."""

    folder: Path
    tensors: dict[str, StoredTensor]
    removed: tuple[str, ...]  # sentences for the record: what the copy does not have

    @property
    def readable(self) -> tuple[Path, ...]:
        """The copy, and the checked files that its links lead to."""
        links = (path for path in sorted(self.folder.iterdir()) if path.is_symlink())
        return (self.folder, *(path.resolve() for path in links))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())


def sanitize(
    snapshot_dir: Path, into: Path, model_name: str, left_out: Iterable[str] = ()
) -> Snapshot:
    """Copy a snapshot to a new folder in `into`, named after the model because the converter takes
    `general.name` and its parts from there. It has the weight files that transformers reads, and an
    index of what is in them without the tensors that are `left_out`.

    Raises QuantkitError for a folder that is no model, for weights that are only pickles, truncated
    or missing, for a broken or oversized JSON, and for a link that leads out of the snapshot.
    """
    source = snapshot_dir.resolve()
    folder = into / (
        re.sub(r"[^\w.+ -]", "_", model_name.rpartition("/")[2]).strip(". ") or "model"
    )
    folder.mkdir(parents=True)
    removed: list[str] = []
    if not (source / "config.json").is_file():
        raise _not_a_model(source)
    for path in sorted(source.iterdir()):
        if path.name != INDEX:
            _copy(path, folder, source, removed, {"_name_or_path": model_name})
    for path in sorted(source.glob("additional_chat_templates/*.jinja")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        _copy(path, folder / path.parent.name, source, removed, {})
    tensors = _link_weights(source, folder, set(left_out))
    _drop_stale_settings(folder / "config.json", tensors, removed)
    return Snapshot(folder, tensors, tuple(removed))


def _copy(
    path: Path, folder: Path, source: Path, removed: list[str], config: dict[str, str]
) -> None:
    """Copy one file if it is of a kind that is read; note what stays behind for a reason."""
    name, suffix = path.name, path.suffix.lower()
    if suffix == ".py":
        removed.append(f"{name} left out (code)")
    elif suffix in _PICKLES:
        removed.append(f"{name} left out (pickle)")
    elif suffix in _KINDS and (path.is_symlink() or path.is_file()):
        real = _resolve(path, source)
        large = suffix != ".json" or name.startswith(("tokenizer", "vocab", "tekken"))
        limit = _KINDS[suffix] if large else _MAX_CONFIG_BYTES
        try:
            if real.stat().st_size > limit:
                raise QuantkitError(
                    f"{name} has {real.stat().st_size:,} bytes, more than {limit:,}.",
                    "No known model has such a file; check where it came from.",
                )
            if suffix == ".md":
                read_card(real.read_bytes())  # the converter reads it, too, and any YAML
            if suffix == ".json":
                _copy_json(real, folder / name, removed, config if name == "config.json" else {})
            else:
                shutil.copyfile(real, folder / name)
        except QuantkitError as error:
            if _NEEDED.fullmatch(name):
                raise
            removed.append(f"{name} left out ({error.message.rstrip('.')})")


def _resolve(path: Path, source: Path) -> Path:
    """The plain file that `path` names, inside the snapshot or the blobs of its Hub cache."""
    real = path.resolve()
    homes = [source]
    if source.parent.name == "snapshots":
        homes.append(source.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise QuantkitError(
            f"{path.name} is a link that leads out of the model's folder.",
            "Replace the link with the file itself.",
        )
    if not real.is_file():
        raise QuantkitError(f"{path.name} is not a regular file.", "Download the model again.")
    return real


def _copy_json(path: Path, target: Path, removed: list[str], config: dict[str, str]) -> None:
    """Copy a JSON file without `auto_map` and without names of files elsewhere. A file that has
    neither is copied byte for byte.
    """
    dropped: list[str] = []

    def clean(pairs: list[tuple[str, object]]) -> dict[str, object]:
        kept = {}
        for key, value in pairs:  # sees repeated keys too
            # "vocab_file": "/home/me/secret" would end up in a published GGUF
            is_path = (
                key.endswith("_file") and isinstance(value, str) and re.search(r"[/\\]", value)
            )
            if key == "auto_map" or is_path:
                dropped.append(key)
            else:
                kept[key] = value
        return kept

    try:
        data = path.read_bytes()
        value = json.loads(data.decode("utf-8"), object_pairs_hook=clean)
    except (ValueError, RecursionError) as error:
        raise QuantkitError(
            f"{target.name} is not valid JSON: {error}.", "Download the file again."
        ) from None
    if not dropped and not config:
        target.write_bytes(data)
        return
    if config:
        if not isinstance(value, dict):
            raise QuantkitError(f"{target.name} is not an object.", "Download the file again.")
        # What the fine-tune was made from, or its author's folder: not this model's name.
        value.update(config)
    target.write_text(json.dumps(value), encoding="utf-8")
    removed.extend(f"{key} removed from {target.name}" for key in sorted(set(dropped)))


def _link_weights(source: Path, folder: Path, left_out: set[str]) -> dict[str, StoredTensor]:
    """Link the safetensors files that belong to the model, checked, and list their tensors."""
    if not list(source.glob("*.safetensors")):
        pickles = [path.name for path in source.iterdir() if path.suffix.lower() in _PICKLES]
        found = f" ({pickles[0]} is a pickle, which can run code when it is read)"
        raise QuantkitError(
            f"The model has no safetensors weights{found if pickles else ''}.",
            "Choose a revision with safetensors, or convert it on the Hub with "
            "the `safetensors/convert` Space.",
        )
    for path in (*source.glob("*.safetensors"), source / INDEX):
        if path.is_symlink() or path.exists():
            _resolve(path, source)
    stored = {n: found for n, found in tensors_of(source).items() if n not in left_out}
    for path in {path for path, _ in stored.values()}:
        (folder / path.name).symlink_to(_resolve(path, source))
    weight_map = {name: path.name for name, (path, _) in stored.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    return {name: tensor for name, (_, tensor) in stored.items()}


def _drop_stale_settings(path: Path, tensors: dict[str, StoredTensor], removed: list[str]) -> None:
    """Have config.json not say that weights are quantized when none is."""
    config = Settings.parse(path.read_bytes(), path.name)
    if is_stale(config, tensors):
        path.write_text(json.dumps(dict(without_quantization(config))), "utf-8")
        removed.append("quantization_config removed from config.json (no weight is quantized)")


def _not_a_model(source: Path) -> QuantkitError:
    if (source / "adapter_config.json").is_file():
        return QuantkitError(
            f"{source.name} is a LoRA adapter, not a whole model.",
            "Merge it onto its base model first.",
        )
    if list(source.glob("*.gguf")):
        return QuantkitError(
            f"{source.name} holds only GGUF files, which are already converted.",
            "Give the original model that they were made from.",
        )
    return QuantkitError(
        f"{source.name} has no config.json: it is not a transformers checkpoint.",
        "Give a model with config.json, tokenizer and safetensors weights.",
    )
