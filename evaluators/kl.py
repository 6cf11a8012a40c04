"""KL divergence of files from their full-precision base, token by token.

    python -m evaluators.kl BASE.gguf FILE.gguf [FILE2.gguf ...] --text FILE --ctx 512

KL(base || file) in nats over the whole vocabulary, for the second half of every window, as
`llama-perplexity --kl-divergence` takes it; but exact where that drops tokens with log p <= -16.
Beside it the share of tokens with the same most likely next token, both perplexities and their
ratio. `--weight-kl` adds the KL of the weights alone (`evaluators.weights`). With `--domains`
instead of a text: through the chat template, by domain (`evaluators.domains`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators import command, domains
from evaluators.base_logits import BaseLogits
from evaluators.command import Progress
from evaluators.devices import check_gpu
from evaluators.errors import EvaluationError
from evaluators.figures import Divergence, MeanNats, PairedTest, Perplexity, WindowMeans
from evaluators.llama_runtime import CPU, Model, Runtime
from evaluators.logit_store import LogitStore
from evaluators.logprobs import RowWorkers
from evaluators.perplexity import check_finite, mean_nats, perplexity_of
from evaluators.stats import paired_difference
from evaluators.texts import text_sha256
from evaluators.weights import at_f16
from evaluators.windows import Windows, scored_logits, window_context

F64 = NDArray[np.float64]
DEVICE_WINDOWS = 2  # enough for a mean of two devices' difference, and little work for the CPU


@dataclass(frozen=True)
class TokenScores:
    """Every scored token of one domain, arrays [n_windows, n_scored]: KL and -log p in nats, and
    whether the most likely token is the base's.
    """

    kl: F64
    nll: F64
    base_nll: F64
    same_top: NDArray[np.bool_]

    def by_window(self) -> WindowMeans:
        """Return the mean of every window."""
        columns = (self.kl, self.nll, self.base_nll, self.same_top)
        return WindowMeans(*(tuple(map(float, array.mean(axis=1))) for array in columns))


@dataclass(frozen=True)
class KLSummary:
    """One domain, or all of them together. `ln_ppl_ratio` is ln(PPL(file) / PPL(base))."""

    kl: Divergence
    top1: float
    top1_stderr: float
    perplexity: Perplexity
    base_perplexity: Perplexity
    ln_ppl_ratio: MeanNats
    n_windows: int


@dataclass(frozen=True)
class KLResult:
    """One file against one base. `tokens` (for pairing) stays out of the JSON.

    `same_tokens` tells whether the file's own tokenizer cuts the texts as the base's does; the
    base's tokens are what both models are given.
    """

    file: str
    n_bytes: int
    base: str
    base_n_bytes: int
    protocol: str
    n_ctx: int
    same_tokens: bool
    combined: KLSummary
    domains: dict[str, KLSummary]
    text_sha256: dict[str, str]
    seconds: float
    tokens: dict[str, TokenScores] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the combined figures at the top level, each domain's under `domains`."""
        return {
            **asdict(self.combined),
            "domains": {name: asdict(summary) for name, summary in self.domains.items()},
            "file": self.file,
            "n_bytes": self.n_bytes,
            "base": self.base,
            "base_n_bytes": self.base_n_bytes,
            "protocol": self.protocol,
            "n_ctx": self.n_ctx,
            "same_tokens": self.same_tokens,
            "text_sha256": self.text_sha256,
            "seconds": self.seconds,
        }


def summarize(scores: Sequence[TokenScores]) -> KLSummary:
    """Summarize the tokens of one domain, or of several."""
    kl = np.concatenate([x.kl.ravel() for x in scores])
    mean = mean_nats([x.kl for x in scores])
    same = np.concatenate([x.same_top.ravel() for x in scores])
    top1 = float(same.mean())
    median, p99, p999 = (float(q) for q in np.quantile(kl, (0.5, 0.99, 0.999)))
    return KLSummary(
        kl=Divergence(
            mean.mean, mean.stderr, mean.ci95, median, p99, p999, float(kl.max()), kl.size
        ),
        top1=top1,
        top1_stderr=math.sqrt(top1 * (1 - top1) / max(1, same.size - 1)),
        perplexity=perplexity_of(mean_nats([x.nll for x in scores])),
        base_perplexity=perplexity_of(mean_nats([x.base_nll for x in scores])),
        ln_ppl_ratio=mean_nats([x.nll - x.base_nll for x in scores]),
        n_windows=sum(x.kl.shape[0] for x in scores),
    )


def measure(
    base: BaseLogits,
    file: Path | str,
    runtime: Runtime = CPU,
    progress: Progress | None = None,
    max_windows: int | None = None,
) -> KLResult:
    """Measure the KL of one file against computed base logits.

    Args:
        progress: called with (windows done, windows in all).
        max_windows: of each domain, from its start; all that the base has when None.

    Raises:
        EvaluationError: a broken file, a vocabulary of another size, logits that are not finite.
    """
    with Model(file, runtime) as model:
        return measure_model(base, model, progress, max_windows)


def measure_model(
    base: BaseLogits,
    model: Model,
    progress: Progress | None = None,
    max_windows: int | None = None,
) -> KLResult:
    """Do `measure` of a file that is open."""
    started, file = time.monotonic(), model.path
    tokens: dict[str, TokenScores] = {}
    done = 0
    n_windows = {d: _first(s.windows.n_windows, max_windows) for d, s in base.stores.items()}
    with RowWorkers(model.n_vocab, model.runtime.threads) as workers:
        same_tokens = True
        for domain, store in base.stores.items():
            if model.n_vocab != store.n_vocab:
                raise EvaluationError(
                    f"{file} has {model.n_vocab} tokens in its vocabulary, the base "
                    f"{base.base} has {store.n_vocab}.",
                    "Compare files of the same model.",
                )
            model.check_context(store.windows.n_ctx)
            picked = None if base.picked is None else base.picked[domain]
            same_tokens &= _cuts_alike(model, base.texts[domain], store.windows, picked)

            def advance(n: int, _total: int, before: int = done) -> None:
                if progress:
                    progress(before + n, sum(n_windows.values()))

            tokens[domain] = _score(model, store, n_windows[domain], workers, advance)
            done += n_windows[domain]
        n_bytes = model.n_bytes
    return KLResult(
        file=str(file),
        n_bytes=n_bytes,
        base=str(base.base),
        base_n_bytes=base.n_bytes,
        protocol="llama.cpp",
        n_ctx=next(iter(base.stores.values())).windows.n_ctx,
        same_tokens=same_tokens,
        combined=summarize(list(tokens.values())),
        domains={domain: summarize([scores]) for domain, scores in tokens.items()},
        text_sha256={domain: text_sha256(text) for domain, text in base.texts.items()},
        seconds=round(time.monotonic() - started, 3),
        tokens=tokens,
    )


def between_devices(
    file: Path | str,
    text: str,
    runtime: Runtime,
    cpu: Runtime = CPU,
    n_ctx: int = 512,
    max_windows: int = DEVICE_WINDOWS,
) -> Divergence:
    """Return KL(CPU || GPU) of one file: how far the GPU of `runtime` is from the CPU of `cpu`, on
    the first windows of `text`.

    Raises EvaluationError for a broken file, and for a GPU that is not there.
    """
    if not runtime.n_gpu_layers or cpu.n_gpu_layers:
        raise ValueError("a GPU is compared with a CPU")
    check_gpu()
    with BaseLogits.compute(file, {"text": text}, n_ctx, max_windows, runtime=cpu) as on_cpu:
        return measure(on_cpu, file, runtime).combined.kl


def measure_weights(
    base: BaseLogits,
    file: Path | str,
    folder: Path | None = None,
    runtime: Runtime = CPU,
    progress: Progress | None = None,
    max_windows: int | None = None,
    memory: int = 0,
) -> KLResult:
    """Measure the file expanded to F16 as `measure` does: the KL of its weights alone.

    The weights (2 bytes a parameter) are in memory if `memory` bytes hold them, else in a temporary
    file in `folder`; in the system's when None.
    """
    with at_f16(Path(file), folder, runtime, memory) as model:
        return measure_model(base, model, progress, max_windows)


def paired_test(a: KLResult, b: KLResult) -> PairedTest:
    """Return whether the mean KL of two files differs on the same windows; below zero, `a` is
    better.
    """
    if a.tokens.keys() != b.tokens.keys():
        raise EvaluationError(
            "The two files were not measured on the same texts.", "Measure them together."
        )
    return paired_difference(
        [a.tokens[domain].kl for domain in a.tokens], [b.tokens[domain].kl for domain in a.tokens]
    )


def save_tokens(result: KLResult, path: Path) -> None:
    """Write the per-token arrays as .npz, keys `DOMAIN/kl`, `/nll`, `/base_nll`, `/same_top`."""
    arrays = {
        f"{domain}/{name}": getattr(scores, name)
        for domain, scores in result.tokens.items()
        for name in ("kl", "nll", "base_nll", "same_top")
    }
    # savez puts .npz after any other name; through a file the name stays as it was given
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def weight_fields(result: KLResult) -> dict[str, Any]:
    """Return what a file's JSON says about its weights alone."""
    return {
        "weight_kl": asdict(result.combined.kl),
        "weight_top1": result.combined.top1,
        "weight_domains": {name: asdict(domain.kl) for name, domain in result.domains.items()},
    }


def _first(n_windows: int, max_windows: int | None) -> int:
    if max_windows is not None and max_windows < 1:
        raise EvaluationError(f"{max_windows} windows leave nothing to score.", "Use 1 or more.")
    return n_windows if max_windows is None else min(n_windows, max_windows)


def _score(
    model: Model, store: LogitStore, n_windows: int, workers: RowWorkers, progress: Progress
) -> TokenScores:
    windows = store.windows
    shape = (n_windows, windows.n_scored)
    kl, nll, same = np.empty(shape), np.empty(shape), np.empty(shape, np.bool_)
    with window_context(model, windows.n_ctx, windows.first) as context:
        for i, window in enumerate(windows.tokens[:n_windows]):
            for row, logits, targets in scored_logits(context, window, windows.first):
                start, part = i * windows.n_scored + row, slice(row, row + len(logits))
                kl[i, part], nll[i, part], same[i, part] = workers.kl(
                    logits, targets, store.rows_of(start, len(logits)), store.reader(start)
                )
            check_finite(nll[i], model.path)
            progress(i + 1, n_windows)
    return TokenScores(kl, nll, store.rows.nll[: kl.size].reshape(shape), same)


def _cuts_alike(model: Model, text: str, windows: Windows, picked: Sequence[int] | None) -> bool:
    """Whether the model's own tokenizer gives the base's windows, the first or the `picked` ones of
    the text.
    """
    ids, n_ctx = model.tokenize(text), windows.n_ctx
    found = ids[: len(ids) // n_ctx * n_ctx].reshape(-1, n_ctx)
    which = list(range(windows.n_windows) if picked is None else picked)
    if max(which) >= len(found):
        return False
    found = found[which]
    if model.adds_bos:
        found[:, 0] = model.bos
    return bool(np.array_equal(found, windows.tokens))


def measure_files(
    base: BaseLogits,
    files: Sequence[Path],
    weights: bool = False,
    folder: Path | None = None,
    runtime: Runtime = CPU,
) -> tuple[list[dict[str, Any]], list[KLResult]]:
    """Return the JSON row and the result of every file, and show progress on stderr. Each file but
    the first is tested against the first (`versus_first`). `weights` adds the figures of the
    weights alone, and tests them, too.

    Raises EvaluationError, before anything is measured, when two files are to be tested on a domain
    of a single window.
    """
    if len(files) > 1 and any(store.windows.n_windows < 2 for store in base.stores.values()):
        raise EvaluationError(
            "A paired test needs at least two windows of each text.",
            "Use more --chunks or a longer text, or give one file.",
        )
    rows: list[dict[str, Any]] = []
    results: list[KLResult] = []
    first_weights: KLResult | None = None
    for file in files:
        line = command.ProgressLine(f"{file.name} windows")
        result = measure(base, file, runtime, line)
        row = result.to_json()
        if weights:
            line = command.ProgressLine(f"{file.name} at F16 windows")
            of_weights = measure_weights(base, file, folder, runtime, line)
            row |= weight_fields(of_weights)
            if first_weights is not None:
                row["weight_versus_first"] = asdict(paired_test(of_weights, first_weights))
            first_weights = first_weights or of_weights
        if results:
            row["versus_first"] = asdict(paired_test(result, results[0]))
        results.append(result)
        rows.append(row)
    return rows, results


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    if options.domains:
        return domains.evaluate(options)
    runtime = command.runtime_of(options)
    texts = command.read_domains(options)
    if options.save and len(options.files) > 1:
        raise EvaluationError(
            "--save works with a single file.", "Give one FILE, or leave --save out."
        )
    with BaseLogits.compute(
        options.base,
        texts,
        options.ctx,
        options.chunks,
        options.cache,
        runtime,
        command.ProgressLine("base windows"),
    ) as base:
        rows, results = measure_files(
            base, options.files, options.weight_kl, options.cache, runtime
        )
    if options.save:
        save_tokens(results[0], options.save)
    return rows[0] if len(rows) == 1 else {"files": rows}


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the files of a command's JSON, one or several."""
    files: list[dict[str, Any]] = result.get("files", [result])
    return files


def show(result: dict[str, Any]) -> None:
    """Print the table of one or several files, and each domain's KL where there are several."""
    if "floor" in result:
        domains.show(result)
        return
    rows = rows_of(result)
    names = list(rows[0]["domains"]) if len(rows[0]["domains"]) > 1 else []
    weights = "weight_kl" in rows[0]
    headers = ["file", "bytes", "KL", *(["weight KL"] if weights else []), "median", "99.9 %"]
    headers += ["same top-1", "perplexity", "ln ratio", *names]
    headers += ["KL - first's"] if "versus_first" in rows[-1] else []
    lines = []
    for row in rows:
        kl, ratio = row["kl"], row["ln_ppl_ratio"]
        line = [Path(row["file"]).name, f"{row['n_bytes']:,}"]
        line += [command.with_error(kl["mean"], kl["stderr"], 5)]
        line += [f"{row['weight_kl']['mean']:.5f}"] if weights else []
        line += [f"{kl['median']:.5f}", f"{kl['p999']:.3f}"]
        line += [f"{100 * row['top1']:.2f} ± {100 * row['top1_stderr']:.2f} %"]
        line += [f"{row['perplexity']['value']:.4f}"]
        line += [command.with_error(ratio["mean"], ratio["stderr"], 5)]
        line += [f"{row['domains'][domain]['kl']['mean']:.5f}" for domain in names]
        if "versus_first" in rows[-1]:
            line += [_versus(row.get("versus_first"))]
        lines.append(line)
    command.print_table(headers, lines)
    for row in rows:
        if not row["same_tokens"]:
            print(f"{Path(row['file']).name} tokenizes the text differently from the base.")


def _versus(test: dict[str, Any] | None) -> str:
    if test is None:
        return "-"
    verdict = "differs" if test["significant"] else "no difference shown"
    return f"{test['difference']:+.5f} ± {test['stderr']:.5f} ({verdict})"


def add_kl_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep the base's logits here for the next run"
    )
    parser.add_argument(
        "--weight-kl", action="store_true", help="also measure each file expanded to F16"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.kl", description="Measure the KL divergence of GGUF files from their base."
    )
    parser.add_argument("base", type=Path, metavar="BASE.gguf", help="the full-precision GGUF")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    command.add_text_options(parser)
    add_kl_options(parser)
    domains.add_options(parser)
    parser.add_argument(
        "--save", type=Path, metavar="FILE.npz", help="save per-token KL and -log p"
    )
    command.add_runtime_options(parser)
    return command.run_command(parser, _evaluate, show, argv)


if __name__ == "__main__":
    sys.exit(main())
