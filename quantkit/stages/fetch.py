"""fetch: a Hub id, a folder or the demo becomes a pinned snapshot whose every weight was looked at.

Writes `snapshot.json`: everything known about the model (`ModelInfo`) and where its files are.
Files from the Hub stay in huggingface_hub's cache and are not copied; their sha256 is compared with
the Hub's. NaN and infinite weights are refused here, before hours of work on them. A LoRA adapter
is merged onto its base, and a quantized checkpoint expanded to 16 bits, in this stage's folder.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo, RepoFile
from quantkit.checkpoint.quantized import check_equalizable, source_of
from quantkit.checkpoint.safetensors import scan
from quantkit.errors import QuantkitError
from quantkit.files import READERS, write_json
from quantkit.hub.visibility import closed, why_private
from quantkit.llamacpp.converter.architectures import check_architecture
from quantkit.llamacpp.output import safe_name
from quantkit.planning import texts
from quantkit.planning.cost import free_bytes
from quantkit.planning.disk import guessed
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.sizes import size
from quantkit.sources.fit import Fit, check_fit, copies_in, kept_notes
from quantkit.sources.resolve import DEMO_FOLDER, read_headers, resolve

NAME = "fetch"


class Fetch(Stage):
    """Download the model and pin its exact version."""

    name = NAME
    version = 2
    fields = ("model", "revision")

    def execute(self, run: Run) -> StageResult:
        """Fetch the model of `run.config`. Raise QuantkitError for everything that is refused."""
        for remark in texts.look(run.config):  # before the download
            run.events.emit(NAME, "note", remark)
        token = hub.resolve_token()
        own = run.artifacts.folder(NAME)
        said = "making the demo's full-precision checkpoint"
        making = partial(run.events.emit, NAME, "note", said)
        info = resolve(run.config.model, run.config.revision, token, own, making)
        made = sorted(path for path in (own / DEMO_FOLDER).glob("*") if path.is_file())
        check_architecture(info.config)  # before anything large is downloaded
        run.events.emit(NAME, "note", _describe(info), model=info.id, sha=info.sha)
        if run.config.publish:  # what is not possible after all the work is said before it
            hub.check_write(run.config.publish, token, why_private(run.config, info) is not None)
        free = free_bytes(run.config.device), free_bytes("cpu")
        needed = max(guessed(run.config, info, *free).values())
        hub.check_disk(run.dir.path, needed, f"a run of {info.id}")

        fit = _look_at_headers(run, info, token)
        source = source_of(info.id, info.config, info.base_model)
        if run.config.equalize:
            check_equalizable(source)
        if source is not None:
            run.events.emit(NAME, "note", source.sentence(info.base_model))
        folder = own / safe_name(info.id)
        if source is not None and source.is_expanded:
            from quantkit.sources.dequantize import dequantize  # needs torch

            made = dequantize(
                _bring(run, info, token), [f.path for f in info.files], source, folder
            )
        elif info.base is None:
            folder = _bring(run, info, token)
        else:
            from quantkit.sources.lora import merge

            base, adapter = _bring(run, info.base, token), _bring(run, info, token)
            run.events.emit(NAME, "note", f"merging {info.id} onto {info.base.id}")
            base_files, own_files = ([f.path for f in i.files] for i in (info.base, info))
            made = merge(base, base_files, adapter, own_files, folder)
            fit = check_fit(folder)
        copied = copies_in(folder, fit.tied)
        for note in kept_notes(fit.tied, copied):
            run.events.emit(NAME, "note", note)
        if folder.is_relative_to(run.dir.path):  # that folder may be moved, or named otherwise
            folder = folder.relative_to(run.dir.path)
        else:
            folder = folder.absolute()
        path = write_json(
            run.artifacts.snapshot,
            {"info": info, "folder": str(folder), "left_out": [*fit.unread, *copied]},
        )
        summary = {
            "model": info.id,
            "sha": info.sha,
            "architecture": info.architectures[0],
            "n_parameters": info.n_parameters,
            "n_bytes": info.n_download_bytes,
            "license": info.license,
            "closed": closed(info),
        }
        if source is not None:
            summary["source"] = source.scheme
        if info.base is not None:
            summary |= {"base": info.base.id, "base_sha": info.base.sha}
        return StageResult([path, *made], summary)

    def last_reader(self, path: str) -> str:
        """Weights made here are not published; what is known of the model goes onto the card."""
        return "publish" if path.endswith("snapshot.json") else "validate"


def _look_at_headers(run: Run, info: ModelInfo, token: str | None) -> Fit:
    """Whether transformers would load the model whole, before its weights are downloaded."""
    folder = run.artifacts.folder(NAME) / "headers"
    try:
        _, fit = read_headers(info, token, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for note in (*info.notes, *fit.notes):
        run.events.emit(NAME, "note", note)
    return fit


def _bring(run: Run, info: ModelInfo, token: str | None) -> Path:
    """Download a model and look at its weights: one progress bar over both halves."""
    n_to_come = 0 if info.local_path else sum(file.n_bytes for file in info.files)
    n_weights = sum(file.n_bytes for file in info.files if file.path in info.weights)
    n_total = n_to_come + n_weights

    def downloading(done: int, total: int) -> None:
        run.events.progress(NAME, done, n_total, f"downloading {info.id}")

    def checking(done: int) -> None:
        run.events.progress(NAME, n_to_come + done, n_total, f"checking {info.id}")

    folder = hub.download(info, token, downloading)
    check_weights(info, folder, checking)
    return folder


def _describe(info: ModelInfo) -> str:
    onto = f", an adapter of {info.base.id} at {info.base.sha[:12]}" if info.base else ""
    return (
        f"{info.id} at {info.sha[:12]}{onto}: {info.architectures[0]}, "
        f"{info.n_parameters / 1e6:,.0f}M parameters, {size(info.n_download_bytes)}, "
        f"license {info.license or 'not stated'}"
    )


def check_weights(
    info: ModelInfo, folder: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Read every weight once. Raises QuantkitError naming the first tensor with NaN or infinite
    values, and for a file whose bytes are not those of the Hub.

    `progress(n_bytes)` is called with the bytes read so far.
    """
    files = [file for file in info.files if file.path in info.weights]
    lock = threading.Lock()
    n_done = 0

    def on_bytes(n: int) -> None:
        nonlocal n_done
        with lock:
            n_done += n
            if progress is not None:
                progress(n_done)

    def check(file: RepoFile) -> None:
        # A local file's hash was taken from these very bytes a moment ago: nothing to compare.
        hashing = info.local_path is None and file.sha256 is not None
        found = scan(folder / file.path, hashing=hashing, on_bytes=on_bytes)
        if found.non_finite is not None:
            raise QuantkitError(
                f"{info.id} has NaN or infinite weights in {found.non_finite} ({file.path}).",
                "The checkpoint is broken (a failed merge or an overflow in float16): use another "
                "revision, or tell its author.",
            )
        if hashing and found.sha256 != file.sha256:
            raise QuantkitError(
                f"{file.path} of {info.id} is damaged: its bytes are not those of the Hub.",
                f"Delete {(folder / file.path).resolve()} and start again.",
            )

    with ThreadPoolExecutor(READERS) as pool:  # reading, hashing and numpy all let go of the GIL
        list(pool.map(check, files))
