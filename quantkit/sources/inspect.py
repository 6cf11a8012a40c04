"""Look at a model before any long work: what it is, and whether it can be quantized.

Costs one request for the file list, two for small files, and one per safetensors file for its
header; no weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import ModelInfo as RemoteModel

from quantkit.checkpoint.adapter import CONFIG, WEIGHTS, Adapter, read_adapter
from quantkit.checkpoint.bounds import check_numbers
from quantkit.checkpoint.info import (
    ModelInfo,
    RepoFile,
    count_parameters,
    is_adapter,
    is_small_file,
    name_of,
    refuse_by_config,
    refuse_by_files,
)
from quantkit.checkpoint.quantized import (
    STALE,
    CannotExpand,
    expanded,
    is_stale,
    quantization_of,
    source_of,
    without_quantization,
)
from quantkit.checkpoint.safetensors import (
    Count,
    Header,
    header_length,
    parse_header,
    read_header,
)
from quantkit.checkpoint.weight_files import INDEX, SINGLE, choose, main_dtype, shown, stored
from quantkit.errors import QuantkitError
from quantkit.files import READERS, sha256_file
from quantkit.hub.card_data import read_card
from quantkit.hub.client import Asked, call, hf_api, read_start
from quantkit.hub.errors import CAUGHT, ModelNotFound
from quantkit.hub.reference import ModelRef, parse_reference
from quantkit.sandbox.untrusted import Settings

logger = logging.getLogger(__name__)

_MAX_CONFIG_BYTES = 10_000_000
_MAX_INDEX_BYTES = 100_000_000
_FIRST_READ_BYTES = 100_000  # holds the whole header of most files: one request instead of two
N_WORKERS = 8
_OF_BASE = ("license", "license_name", "license_link", "language", "pipeline_tag")


def inspect(ref: ModelRef, token: str | None = None) -> ModelInfo:
    """Return what the model is and whether it can be quantized, without downloading weights.

    Raises QuantkitError for everything that is refused; ValueError for the demo, which has no
    files until `quantkit.sources.demo` has made them (inspect that folder instead).
    """
    if ref.is_local:
        return _inspect_folder(Path(ref.id), token)
    if not ref.is_on_hub:
        raise ValueError(f"{ref} has to be made first")
    api = hf_api(token)

    def ask(repo_id: str, revision: str | None) -> RemoteModel:
        return call(
            lambda: api.model_info(repo_id, revision=revision, files_metadata=True),
            Asked(repo_id, revision),
            token,
        )

    try:
        remote = ask(ref.id, ref.revision)
        if remote.id != ref.id:  # gpt2 -> openai-community/gpt2: a redirect may lose the question
            remote = ask(remote.id, remote.sha)
    except ModelNotFound:
        _refuse_other_kind(ref.id, token)
        raise
    name, sha = remote.id, str(remote.sha)
    files = [
        RepoFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None)
        for s in remote.siblings or []
    ]
    card = Settings(remote.card_data.to_dict() if remote.card_data is not None else None)

    def read_file(path: str, limit: int) -> bytes:
        return read_start(name, sha, path, limit, token)

    def read_headers(weights: Sequence[RepoFile]) -> list[Header]:
        count = Count()

        def one(file: RepoFile) -> Header:
            data = remote_header(name, sha, file, token)
            return count.add(parse_header(data, f"{file.path} of {name}", file.n_bytes))

        with ThreadPoolExecutor(N_WORKERS) as pool:
            return list(pool.map(one, weights))

    return _describe(
        kind="hub",
        name=name,
        revision=ref.revision,
        files=files,
        card=card,
        read_file=read_file,
        read_headers=read_headers,
        content_sha=lambda _: sha,
        inspect_base=lambda adapter: _inspect_base(adapter, token, allow_local=False),
        library=remote.library_name,
        gated=bool(remote.gated),
        private=bool(remote.private),
        pipeline_tag=remote.pipeline_tag,
        tags=tuple(remote.tags or ()),
    )


def _refuse_other_kind(repo_id: str, token: str | None) -> None:
    """Raise QuantkitError when a dataset or a Space of this id exists."""
    api = hf_api(token)
    for kind, article in (("dataset", "a dataset"), ("space", "a Space")):
        try:
            found = api.repo_exists(repo_id, repo_type=kind)
        except CAUGHT as error:  # the question was only asked to give a better sentence
            logger.debug("no answer about %s %s: %s", kind, repo_id, type(error).__name__)
            continue
        if found:
            raise QuantkitError(
                f"{repo_id} is {article}, not a model.", "Give the id of a model."
            ) from None


def _inspect_base(adapter: Adapter, token: str | None, *, allow_local: bool) -> ModelInfo:
    """What an adapter is merged onto. A path of its author's machine is no reason to look here."""
    ref = parse_reference(adapter.base, adapter.revision, allow_local=allow_local)
    try:
        base = inspect(ref, token)
    except CannotExpand:
        raise _no_weights_to_merge_onto(ref.id, "quantized") from None
    if base.base is not None:
        raise _no_weights_to_merge_onto(base.id, "an adapter itself")
    if base.quantization is not None:
        raise _no_weights_to_merge_onto(base.id, "quantized")
    return base


def _no_weights_to_merge_onto(base: str, what: str) -> QuantkitError:
    return QuantkitError(
        f"The base of this adapter, {base}, is {what}: there are no full-precision weights"
        " to merge onto.",
        "Merge it onto the original yourself (peft's merge_and_unload), and give the result.",
    )


def _inspect_folder(folder: Path, token: str | None) -> ModelInfo:
    if not folder.is_dir():
        raise QuantkitError(f"There is no folder {folder}.", "Check the path.")
    paths = [p for p in folder.iterdir() if p.is_file()]
    paths += [p for p in folder.glob("additional_chat_templates/*.jinja") if p.is_file()]
    files = [RepoFile(p.relative_to(folder).as_posix(), p.stat().st_size) for p in sorted(paths)]
    readme = folder / "README.md"

    def read_file(path: str, limit: int) -> bytes:
        with (folder / path).open("rb") as file:
            return file.read(limit)

    def read_headers(weights: Sequence[RepoFile]) -> list[Header]:
        count = Count()
        return [count.add(read_header(folder / file.path)) for file in weights]

    return _describe(
        kind="local",
        name=name_of(folder),
        revision=None,
        files=files,
        card=_card(readme) if readme.is_file() else Settings(),
        read_file=read_file,
        read_headers=read_headers,
        content_sha=_content_sha,
        inspect_base=lambda adapter: _inspect_base(adapter, token, allow_local=True),
        local_path=str(folder),
    )


def _card(readme: Path) -> Settings:
    """The YAML at the top of a local README; a card that cannot be read describes nothing."""
    try:
        return read_card(readme.read_bytes())
    except QuantkitError as error:  # nothing of the model depends on it
        logger.warning("%s of %s is not read: %s", readme.name, readme.parent, error.message)
        return Settings()


def _content_sha(files: Sequence[RepoFile]) -> str:
    lines = sorted(f"{file.path}\0{file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _describe(
    *,
    kind: str,
    name: str,
    revision: str | None,
    files: Sequence[RepoFile],
    card: Settings,
    read_file: Callable[[str, int], bytes],
    read_headers: Callable[[Sequence[RepoFile]], list[Header]],
    content_sha: Callable[[Sequence[RepoFile]], str],
    inspect_base: Callable[[Adapter], ModelInfo],
    library: str | None = None,
    gated: bool = False,
    private: bool = False,
    pipeline_tag: str | None = None,
    tags: tuple[str, ...] = (),
    local_path: str | None = None,
) -> ModelInfo:
    """The part that is the same for the Hub and a folder. Raises QuantkitError for refusals."""
    by_path = {file.path: file for file in files}
    bases = card.texts("base_model")
    notes: list[str] = []
    base, dtype = None, ""
    if is_adapter(by_path):
        settings = Settings.parse(read_file(CONFIG, _MAX_CONFIG_BYTES), f"{CONFIG} of {name}")
        base = inspect_base(read_adapter(name, by_path, settings))
        config, bases, dtype = base.config, (base.id,), base.dtype or ""
        notes += base.notes
        weights: tuple[str, ...] = (WEIGHTS,)
        read_headers([by_path[WEIGHTS]])
        n_by_dtype = base.n_by_dtype
        card = Settings({**{k: base.card[k] for k in _OF_BASE if base.card.get(k)}, **card})
        gated = gated or base.gated
    else:
        refuse_by_files(name, list(by_path), library, bases)
        data = read_file("config.json", _MAX_CONFIG_BYTES)
        config = Settings.parse(data, f"config.json of {name}")
        refuse_by_config(name, config)
        weights = choose(
            name,
            by_path,
            lambda: Settings.parse(read_file(INDEX, _MAX_INDEX_BYTES), f"{INDEX} of {name}"),
        )
        headers = read_headers([by_path[path] for path in weights])
        found = stored(name, zip(weights, (header.tensors for header in headers), strict=True))
        tensors = {tensor_name: tensor for tensor_name, (_, tensor) in found.items()}
        if is_stale(config, tensors):
            method = shown((quantization_of(config) or Settings()).text("quant_method"))
            notes.append(STALE.format(method=method))
            config = without_quantization(config)
        check_numbers(name, config, tensors.values())
        n_by_dtype = count_parameters(tensors.values())
        source = source_of(name, config, bases)
        if source is not None and source.is_expanded:
            n_by_dtype = count_parameters(expanded(source, tensors).values())
        dtype = main_dtype(tensors.values()) or dtype
    needed = set(weights) if weights in ((SINGLE,), (WEIGHTS,)) else {INDEX, *weights}
    wanted = [file for file in files if file.path in needed or is_small_file(file)]
    if local_path is not None:
        with ThreadPoolExecutor(READERS) as pool:
            hashes = pool.map(sha256_file, [Path(local_path, file.path) for file in wanted])
            wanted = [
                RepoFile(file.path, file.n_bytes, sha256)
                for file, sha256 in zip(wanted, hashes, strict=True)
            ]
    return ModelInfo(
        kind=kind,
        id=name,
        revision=revision,
        sha=content_sha(wanted) if local_path is None or base is None else _both(wanted, base),
        files=tuple(wanted),
        weights=weights,
        n_download_bytes=sum(file.n_bytes for file in wanted)
        + (base.n_download_bytes if base is not None and not base.local_path else 0),
        architectures=config.texts("architectures"),
        model_type=config.text("model_type"),
        n_parameters=sum(n_by_dtype.values()),
        n_by_dtype=n_by_dtype,
        dtype=dtype or next(iter(n_by_dtype), ""),
        config=config,
        quantization=quantization_of(config),
        license=next(iter(card.texts("license")), None),
        license_name=next(iter(card.texts("license_name")), None),
        license_link=next(iter(card.texts("license_link")), None),
        gated=gated,
        private=private,
        is_adapter=base is not None,
        pipeline_tag=pipeline_tag or next(iter(card.texts("pipeline_tag")), None),
        base_model=bases,
        languages=card.texts("language"),
        tags=tags or card.texts("tags"),
        card=card,
        local_path=local_path,
        base=base,
        notes=tuple(notes),
    )


def _both(files: Sequence[RepoFile], base: ModelInfo) -> str:
    """The sha of a local adapter: with another base it is another model."""
    return hashlib.sha256(f"{_content_sha(files)}{base.id}{base.sha}".encode()).hexdigest()


def remote_header(repo_id: str, sha: str, file: RepoFile, token: str | None) -> bytes:
    """Return the length field and JSON of a safetensors file on the Hub, by range requests."""
    start = b""
    if file.n_bytes:  # there is no range of an empty file
        start = read_start(repo_id, sha, file.path, min(_FIRST_READ_BYTES, file.n_bytes), token)
    n_header = header_length(start, f"{file.path} of {repo_id}")
    n_missing = min(n_header, file.n_bytes) - len(start)
    if n_missing > 0:
        start += read_start(repo_id, sha, file.path, n_missing, token, skip=len(start))
    return start[:n_header]
