"""KL divergence of files from their base on documents, which are the unit of every interval.

One pass of the base writes the distributions of all scored tokens to disk, as `base_logits` does
for windows; then each file takes one pass of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from evaluators.closing import Closing
from evaluators.command import Progress
from evaluators.documents import ALL, Document, Documents, names_of
from evaluators.errors import EvaluationError
from evaluators.figures import Estimate, OnDocuments
from evaluators.greedy import documents_context
from evaluators.llama_runtime import CPU, Context, Model, Runtime, check_gguf, model_sha256
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
from evaluators.stats import quantile_intervals, ratio_interval
from evaluators.weights import at_f16
from evaluators.windows import Windows, scored_logits

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class DocumentScores:
    """The scored tokens of one document: KL in nats, whether the likeliest token is the base's."""

    kl: F64
    same_top: NDArray[np.bool_]


@dataclass(frozen=True)
class DocumentResult:
    """One file against one base: figures by domain, of groups of domains, and of all
    conversations. `scores` are of every document, in their order.
    """

    file: str
    n_bytes: int
    domains: dict[str, OnDocuments]
    scores: tuple[DocumentScores, ...] = field(repr=False)


class DocumentLogits(Closing):
    """A base's distributions on documents. Close it, or use it as a context manager: a temporary
    store is deleted then, one in `cache` stays.
    """

    def __init__(
        self,
        base: Path,
        documents: Documents,
        store: LogitStore,
        folder: tempfile.TemporaryDirectory[str] | None,
    ) -> None:
        self.base, self.documents, self.store = base, documents, store
        self._folder = folder

    @classmethod
    def compute(
        cls,
        base: Path | str,
        documents: Documents,
        cache: Path | None = None,
        runtime: Runtime = CPU,
        progress: Progress | None = None,
    ) -> DocumentLogits:
        """Decode `base` on every document, or take it from `cache`.

        Args:
            cache: where stores are kept and looked for; a temporary folder when None.
            progress: called with (documents done, documents in all).

        Raises:
            EvaluationError: a broken base, too little disk or memory, a store in `cache` that is
                damaged or of something else.
        """
        base = Path(base)
        rows = _as_window(documents)
        key = StoreKey(
            model_sha256(base),
            check_gguf(base),
            documents.sha256(),
            rows.n_ctx,
            None,
            llama_cpp.__version__,
            runtime.n_gpu_layers,
        )
        temporary = None
        if cache is None:
            temporary = tempfile.TemporaryDirectory(prefix="document-logits-")
        folder = Path(temporary.name if temporary else cache or "")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / key.file_name(base, "document-logits")
            if not path.exists():
                _write(base, documents, key, rows, path, runtime, progress)
            return cls(base, documents, open_store(path, key), temporary)
        except BaseException:
            if temporary:
                temporary.cleanup()
            raise

    def close(self) -> None:
        """Close the store, and delete it if it is temporary."""
        self.store.close()
        if self._folder:
            self._folder.cleanup()


def _as_window(documents: Documents) -> Windows:
    """The scored tokens of all documents end to end, as one window of which every token but the
    first is scored: what a store holds rows for.
    """
    targets = [one.ids[one.first + 1 :] for one in documents.documents]
    return Windows(np.concatenate([np.zeros(1, np.int32), *targets])[None], 0)


def _write(
    base: Path,
    documents: Documents,
    key: StoreKey,
    rows: Windows,
    path: Path,
    runtime: Runtime,
    progress: Progress | None,
) -> None:
    with Model(base, runtime) as model, RowWorkers(model.n_vocab, runtime.threads) as workers:
        n_bytes = store_bytes(1, rows.n_ctx, 0, model.n_vocab)
        check_space(path.parent, n_bytes, "The base logits", "Use fewer documents.")
        with StoreWriter(path, key, rows, model.n_vocab) as store:
            for start, logits, targets in _decoded(model, documents.documents, progress):
                found = workers.encode(logits, targets, store.writer(start))
                check_finite(found.nll, model.path)
                store.put_rows(start, found)


def _decoded(
    model: Model, documents: Sequence[Document], progress: Progress | None
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.int32]]]:
    """(index of the first row among all scored tokens, logits, targets), step by step. Documents of
    about one length share a context.
    """
    context: Context | None = None
    n_done, made_for = 0, 0
    try:
        for i, document in enumerate(documents):
            if context is None or not made_for / 8 <= len(document.ids) <= made_for:
                if context is not None:
                    context.close()
                alike = [d for d in documents[i:] if len(d.ids) <= max(1024, len(document.ids))]
                made_for = max(len(d.ids) for d in alike)
                n_scored = max(d.n_scored for d in alike)
                context = documents_context(model, [made_for], n_scored)
            for row, logits, targets in scored_logits(context, document.ids, document.first):
                yield n_done + row, logits, targets
            n_done += document.n_scored
            if progress:
                progress(i + 1, len(documents))
    finally:
        if context is not None:
            context.close()


def measure(
    base: DocumentLogits,
    file: Path | str,
    runtime: Runtime = CPU,
    progress: Progress | None = None,
) -> DocumentResult:
    """Measure the KL of a file on the base's documents.

    Args:
        progress: called with (documents done, documents in all).

    Raises:
        EvaluationError: a broken file, a vocabulary of another size, logits that are not finite.
    """
    with Model(file, runtime) as model:
        return measure_model(base, model, progress)


def measure_weights(
    base: DocumentLogits,
    file: Path | str,
    folder: Path | None = None,
    runtime: Runtime = CPU,
    progress: Progress | None = None,
    memory: int = 0,
) -> DocumentResult:
    """Measure the file expanded to F16: the KL of its weights alone. Of the base itself that is the
    runtime's floor: what is between the base as llama.cpp rounds it and its weights at F16.

    `folder` and `memory` are those of `evaluators.weights.at_f16`.
    """
    with at_f16(Path(file), folder, runtime, memory) as model:
        return measure_model(base, model, progress)


def measure_model(
    base: DocumentLogits, model: Model, progress: Progress | None = None
) -> DocumentResult:
    """Do `measure` of a file that is open."""
    store, documents = base.store, base.documents.documents
    if model.n_vocab != store.n_vocab:
        raise EvaluationError(
            f"{model.path} has {model.n_vocab} tokens in its vocabulary, the base {base.base} has"
            f" {store.n_vocab}.",
            "Compare files of the same model.",
        )
    n = base.documents.n_scored
    kl, same = np.empty(n), np.empty(n, np.bool_)
    with RowWorkers(model.n_vocab, model.runtime.threads) as workers:
        for start, logits, targets in _decoded(model, documents, progress):
            part = slice(start, start + len(logits))
            known = store.rows_of(start, len(logits))
            kl[part], _, same[part] = workers.kl(logits, targets, known, store.reader(start))
    check_finite(kl, model.path)
    ends = np.cumsum([one.n_scored for one in documents])[:-1]
    scores = tuple(
        DocumentScores(*pair) for pair in zip(np.split(kl, ends), np.split(same, ends), strict=True)
    )
    return DocumentResult(
        str(model.path), model.n_bytes, _by_domain(base.documents, scores), scores
    )


def _by_domain(documents: Documents, scores: Sequence[DocumentScores]) -> dict[str, OnDocuments]:
    """Figures by domain, then of groups, then of all that is not a long document."""
    of: dict[str, list[DocumentScores]] = {}
    groups: dict[str, list[DocumentScores]] = {}
    for one, score in zip(documents.documents, scores, strict=True):
        domain, *others = names_of(one.domain, one.group)
        of.setdefault(domain, []).append(score)
        for name in others:
            groups.setdefault(name, []).append(score)
    together = groups.pop(ALL, None)
    every = {**of, **groups, **({ALL: together} if together else {})}
    return {name: summarize(found) for name, found in every.items()}


def summarize(scores: Sequence[DocumentScores]) -> OnDocuments:
    """Return the figures over all tokens of some documents."""
    counts = np.array([float(score.kl.size) for score in scores])
    sums = np.array([score.kl.sum() for score in scores])
    same = np.array([float(score.same_top.sum()) for score in scores])
    n = len(scores)
    spread = quantile_intervals([score.kl for score in scores], (0.5, 0.99, 0.999))
    median, p99, p999 = (Estimate(value, ci95, n) for value, ci95 in spread)
    return OnDocuments(
        kl=Estimate(float(sums.sum() / counts.sum()), ratio_interval(sums, counts), n),
        median=median,
        p99=p99,
        p999=p999,
        max=float(max(score.kl.max() for score in scores)),
        top1=Estimate(float(same.sum() / counts.sum()), ratio_interval(same, counts, most=1.0), n),
        n_tokens=int(counts.sum()),
    )
