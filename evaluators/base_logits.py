"""The base model's log-probabilities, computed once and compared with any number of files.

Loading base and file side by side would need both models in memory and a base pass for every file.
Instead one pass of the base writes its distributions to disk (`evaluators.logit_store`), and each
file then costs one pass of its own: memory holds one model and a window's logits at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp

from evaluators.closing import Closing
from evaluators.command import Progress
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import CPU, Model, Runtime, check_gguf, model_sha256
from evaluators.logit_store import (
    LogitStore,
    StoreKey,
    StoreWriter,
    check_space,
    open_store,
    store_bytes,
)
from evaluators.logprobs import RowWorkers
from evaluators.perplexity import check_finite
from evaluators.texts import text_sha256
from evaluators.windows import Windows, cut_windows, scored_logits, window_context


class BaseLogits(Closing):
    """One base model on one or more texts (domains). Close it, or use it as a context manager: a
    temporary store is deleted then, one in `cache_dir` stays.
    """

    def __init__(
        self,
        base: Path,
        n_bytes: int,
        texts: dict[str, str],
        stores: dict[str, LogitStore],
        folder: tempfile.TemporaryDirectory[str] | None,
        picked: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.base = base
        self.picked = picked  # by domain the numbers of its windows; None: the first ones
        self.n_bytes = n_bytes
        self.texts = texts
        self.stores = stores
        self._folder = folder

    @classmethod
    def compute(
        cls,
        base: Path | str,
        texts: Mapping[str, str],
        n_ctx: int = 512,
        max_windows: int | None = None,
        cache_dir: Path | str | None = None,
        runtime: Runtime = CPU,
        progress: Progress | None = None,
        picked: Mapping[str, Sequence[int]] | None = None,
    ) -> BaseLogits:
        """Decode `base` on every text by the llama.cpp protocol, or take it from `cache_dir`.

        Args:
            base: the full-precision GGUF.
            texts: {domain: text}.
            n_ctx: tokens of a window; the second half is scored.
            max_windows: of each text; all full ones when None.
            cache_dir: where stores are kept and looked for; a temporary folder when None.
            progress: called with (windows done, windows in all).
            picked: {domain: numbers of the windows to decode, from 0}; not with `cache_dir`.

        Raises:
            EvaluationError: a broken base, a text shorter than a window, too little disk, or a
                store in `cache_dir` that is damaged or of something else.
        """
        if not texts:
            raise EvaluationError("There is no text to measure on.", "Give at least one.")
        if picked is not None and (cache_dir is not None or picked.keys() != texts.keys()):
            raise ValueError("windows are picked of every text, and not kept")
        base = Path(base)
        n_bytes = check_gguf(base)
        base_sha256 = model_sha256(base)
        keys = {
            domain: StoreKey(
                base_sha256,
                n_bytes,
                text_sha256(text),
                n_ctx,
                max_windows,
                llama_cpp.__version__,
                runtime.n_gpu_layers,
            )
            for domain, text in texts.items()
        }
        temporary = None
        if cache_dir is None:
            temporary = tempfile.TemporaryDirectory(prefix="base-logits-")
        folder = Path(temporary.name if temporary else cache_dir or "")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = {domain: folder / key.file_name(base, "logits") for domain, key in keys.items()}
            missing = {domain: texts[domain] for domain in texts if not paths[domain].exists()}
            if missing:
                _write_stores(base, missing, keys, paths, runtime, progress, picked)
            stores = {domain: open_store(paths[domain], keys[domain]) for domain in texts}
        except BaseException:
            if temporary:
                temporary.cleanup()
            raise
        return cls(base, n_bytes, dict(texts), stores, temporary, picked)

    @property
    def n_windows(self) -> int:
        """Windows of all domains."""
        return sum(store.windows.n_windows for store in self.stores.values())

    def close(self) -> None:
        """Close the stores and delete them if they are temporary."""
        for store in self.stores.values():
            store.close()
        if self._folder:
            self._folder.cleanup()


def _write_stores(
    base: Path,
    texts: Mapping[str, str],
    keys: Mapping[str, StoreKey],
    paths: Mapping[str, Path],
    runtime: Runtime,
    progress: Progress | None,
    picked: Mapping[str, Sequence[int]] | None,
) -> None:
    first_key = keys[next(iter(texts))]
    with Model(base, runtime) as model, RowWorkers(model.n_vocab, runtime.threads) as workers:
        cut = {
            domain: cut_windows(model, text, "llama.cpp", first_key.n_ctx, first_key.max_windows)
            for domain, text in texts.items()
        }
        if picked is not None:
            cut = {domain: windows.picked(picked[domain]) for domain, windows in cut.items()}
        check_space(
            paths[next(iter(texts))].parent,
            sum(store_bytes(w.n_windows, w.n_ctx, w.first, model.n_vocab) for w in cut.values()),
            "The base logits",
            "Use fewer --chunks, or --cache on another disk.",
        )
        done, total = 0, sum(windows.n_windows for windows in cut.values())
        for domain, windows in cut.items():
            with StoreWriter(paths[domain], keys[domain], windows, model.n_vocab) as store:
                done = _write_windows(model, windows, workers, store, progress, done, total)


def _write_windows(
    model: Model,
    windows: Windows,
    workers: RowWorkers,
    store: StoreWriter,
    progress: Progress | None,
    done: int,
    total: int,
) -> int:
    with window_context(model, windows.n_ctx, windows.first) as context:
        for i, window in enumerate(windows.tokens):
            for row, logits, targets in scored_logits(context, window, windows.first):
                start = i * windows.n_scored + row
                rows = workers.encode(logits, targets, store.writer(start))
                check_finite(rows.nll, model.path)
                store.put_rows(start, rows)
            done += 1
            if progress:
                progress(done, total)
    return done
