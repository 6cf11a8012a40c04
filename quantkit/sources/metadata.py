"""Download everything of a model but its weights: what a plan is made from, and what is checked
before a download.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantkit.checkpoint.adapter import CONFIG, overlay
from quantkit.checkpoint.codeless import strip
from quantkit.checkpoint.info import ModelInfo, RepoFile
from quantkit.checkpoint.quantized import Source, expanded, source_of, without_quantization
from quantkit.checkpoint.safetensors import (
    StoredTensor,
    header_bytes,
    parse_header,
    read_header,
    write_shell,
    write_shell_of,
)
from quantkit.checkpoint.weight_files import INDEX, SINGLE, in_folder, stored, tensors_of
from quantkit.hub.client import read_start
from quantkit.hub.download import snapshot
from quantkit.sandbox.untrusted import Settings
from quantkit.sources.inspect import N_WORKERS, remote_header

Stored = tuple[dict[str, StoredTensor], Callable[[str, int, int], bytes]]
"""Tensors, and what reads of one: by its name, where to begin in it, and how many bytes."""


def fetch_metadata(info: ModelInfo, token: str | None, folder: Path) -> Path:
    """Fill `folder` with everything but the weights, so that a converter can plan there.

    Small files are copied. Each safetensors file has its header and its size, and a hole where the
    weights are. Of an adapter they are its base's, with its tokenizer over them; of a quantized
    model those of the 16-bit checkpoint that it is expanded to. Raises QuantkitError.
    """
    if info.base is not None:
        small = [file.path for file in info.files if file.path not in info.weights]
        fetch_metadata(info.base, token, folder)
        overlay(_small_files(info, token), small, folder)
        strip(folder)
        return folder
    _make_shells(info, info.files, token, folder)
    source = source_of(info.id, info.config, info.base_model)
    if source is not None and source.is_expanded:
        _expand_shell(folder, source)
    strip(folder)
    return folder


def fetch_adapter(info: ModelInfo, token: str | None, folder: Path) -> Path:
    """Fill `folder` with an adapter's settings, and the header of its weights before a hole."""
    files = [file for file in info.files if file.path in (CONFIG, *info.weights)]
    _make_shells(info, files, token, folder)
    return folder


def _small_files(info: ModelInfo, token: str | None) -> Path:
    """A folder with everything but the weights."""
    if info.local_path:
        return Path(info.local_path)
    small = [file for file in info.files if file.path not in info.weights]
    return snapshot(info.id, info.sha, small, token, progress=None)


def _make_shells(
    info: ModelInfo, files: Sequence[RepoFile], token: str | None, folder: Path
) -> None:
    """Copy small files, and of weights the header and the size."""
    origin = _small_files(info, token)
    for file in files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if file.path not in info.weights:
            shutil.copyfile(origin / file.path, target)

    def make_shell(file: RepoFile) -> None:
        header = (
            header_bytes(origin / file.path)
            if info.local_path
            else remote_header(info.id, info.sha, file, token)
        )
        write_shell(folder / file.path, header, file.n_bytes)

    with ThreadPoolExecutor(N_WORKERS) as pool:
        list(pool.map(make_shell, [file for file in files if file.path in info.weights]))


def _expand_shell(folder: Path, source: Source) -> None:
    """What `sources.dequantize` does, to a folder of shells, in place: headers, no weights."""
    tensors = {name: tensor for name, (_, tensor) in tensors_of(folder).items()}
    made = expanded(source, tensors)
    for path in (*in_folder(folder), folder / INDEX):
        path.unlink(missing_ok=True)
    strip_config(folder / "config.json", folder / "config.json")
    write_shell_of(folder / SINGLE, {n: (e.dtype, e.shape) for n, e in made.items()})


def strip_config(path: Path, target: Path) -> None:
    """Strip config.json of the settings that say that the weights are quantized."""
    config = without_quantization(Settings.parse(path.read_bytes(), path.name))
    target.write_text(json.dumps(dict(config)), "utf-8")


def stored_values(info: ModelInfo, token: str | None) -> Stored:
    """Return the model's stored tensors, and a function that reads bytes of one from where it
    is.
    """
    if info.local_path is not None:
        return values_in(Path(info.local_path))
    headers = {
        file.path: parse_header(
            remote_header(info.id, info.sha, file, token), file.path, file.n_bytes
        )
        for file in info.files
        if file.path in info.weights
    }
    found = stored(info.id, ((path, h.tensors) for path, h in headers.items()))

    def read(name: str, at: int, n_bytes: int) -> bytes:
        path, tensor = found[name]
        start = headers[path].n_bytes + tensor.start + at
        return read_start(info.id, info.sha, path, n_bytes, token, skip=start)

    return {name: tensor for name, (_, tensor) in found.items()}, read


def values_in(folder: Path) -> Stored:
    """Return the same of the checkpoint in `folder`."""
    found = tensors_of(folder)
    starts = {path: read_header(path).n_bytes for path in {path for path, _ in found.values()}}

    def read(name: str, at: int, n_bytes: int) -> bytes:
        path, tensor = found[name]
        with path.open("rb") as file:
            file.seek(starts[path] + tensor.start + at)
            return file.read(n_bytes)

    return {name: tensor for name, (_, tensor) in found.items()}, read
