"""What comes of a checkpoint of `trouble.py`: planned, converted, and compared with what
transformers (and PEFT) make of the very same folder.

Nothing of the project's own checks is used here: loading, tokens and logits are asked of
transformers, the tokenizer and llama.cpp.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trouble import EITHER, REFUSED, RIGHT, Trouble, make_trouble

from evaluators import agreement
from evaluators.errors import EvaluationError
from evaluators.weights import expand_file
from quantkit import config, pipeline
from quantkit.config.targets import LikeMix
from quantkit.errors import QuantkitError
from quantkit.gguf_file.read import GgufFile
from quantkit.planning.plan import make_plan
from quantkit.run.folder import RunDir

KL_LIMIT = 1e-3  # of the mean, at F16
_N_TOKENS = 64
_SEEDS_PER_PROCESS = 50
# What only the weights' values show, which `plan` does not download.
_LATE = ("not-finite", "cut-file", "outlier")


@dataclass(frozen=True)
class Verdict:
    """How it ended: `kind` is one of

    refused   by `plan`, with a sentence
    late      by a later stage: with a sentence, but after the download
    right     a file whose logits, tokens and ends are transformers'
    wrong     anything else, tracebacks included
    """

    seed: int
    trouble: str
    outcome: str  # that may come of it
    kind: str
    detail: str
    kl: float | None = None
    may_be_late: bool = False

    @property
    def is_fine(self) -> bool:
        in_time = self.kind == "refused" or (self.kind == "late" and self.may_be_late)
        if self.outcome == RIGHT:
            return self.kind == "right"
        if self.outcome == REFUSED:
            return in_time
        return in_time or self.kind == "right"

    def __str__(self) -> str:
        kl = "" if self.kl is None else f", KL {self.kl:.2g}"
        return f"{self.kind:8} {self.trouble} [{self.outcome}]: {self.detail}{kl}"


def judge_all(seeds: Sequence[int], folder: Path, n_workers: int = 2) -> Iterator[Verdict]:
    """Verdicts in the order of `seeds`. Workers are replaced after some seeds, all at once: a pool
    told to do it (max_tasks_per_child) stops for ever there on Python 3.11 (CPython issue 115634).
    """
    context = multiprocessing.get_context("spawn")
    n = _SEEDS_PER_PROCESS * n_workers
    for start in range(0, len(seeds), n):
        with ProcessPoolExecutor(n_workers, context, torch.set_num_threads, (1,)) as pool:
            yield from pool.map(partial(judge, folder), seeds[start : start + n])


def judge(folder: Path, seed: int) -> Verdict:
    """The verdict on a seed; its folder is gone afterwards."""
    own = folder / f"seed-{seed}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    try:
        trouble = make_trouble(seed, own)
        kind, detail, kl = _what_comes(trouble, own)
        late = any(name in text for name in _LATE for text in trouble.oddities)
        outcome = trouble.outcome
        if (
            outcome == RIGHT
            and kind in ("refused", "late")
            and _is_refused_by_transformers(trouble)
        ):
            outcome = EITHER  # oddities that are harmless one by one
        if outcome == REFUSED and kind == "right" and not trouble.is_adapter:
            outcome = EITHER  # one oddity took another back, and transformers loads it whole
        return Verdict(seed, str(trouble), outcome, kind, detail, kl, late)
    except Exception:  # of this generator, not of the project: a fault all the same
        return Verdict(seed, f"seed {seed}", RIGHT, "wrong", traceback.format_exc()[-1500:])
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _what_comes(trouble: Trouble, own: Path) -> tuple[str, str, float | None]:
    asked = config.RunConfig(
        str(trouble.path),
        targets=(LikeMix("Q5_K_M"),),
        profile="demo",
        calibration="docs,code",
    )
    try:
        make_plan(asked)
    except QuantkitError as error:
        return "refused", str(error), None
    except Exception:
        return "wrong", f"plan: {traceback.format_exc()[-1500:]}", None
    try:
        pipeline.run(asked, own / "run", until="convert")
    except QuantkitError as error:
        return "late", str(error), None
    except Exception:
        return "wrong", f"run: {traceback.format_exc()[-1500:]}", None
    base = RunDir(own / "run").stage_dir("convert") / "base.gguf"
    return _compared(trouble, base, own)


def _is_refused_by_transformers(trouble: Trouble) -> bool:
    try:
        _reference(trouble.path, np.arange(3, 11, dtype=np.int32))
    except _Refusal:
        return True
    return False


def _compared(trouble: Trouble, base: Path, own: Path) -> tuple[str, str, float | None]:
    """A converted file beside what transformers makes of the same folder."""
    rng = np.random.default_rng(trouble.seed)
    ids = rng.integers(3, 500, _N_TOKENS).astype(np.int32)
    try:
        logits, ends = _reference(trouble.path, ids)
    except _Refusal as refusal:
        return "wrong", f"a file was made, and transformers says: {refusal}", None
    found = _agreement(base, own, ids, logits)
    if not found.mean_kl <= KL_LIMIT:
        return "wrong", "other logits", found.mean_kl
    fault = _vocabulary_fault(trouble.path, base) or _ends_fault(base, ends)
    return ("wrong", fault, found.mean_kl) if fault else ("right", "", found.mean_kl)


def _agreement(base: Path, own: Path, ids: np.ndarray, logits: np.ndarray) -> Any:
    """At F16; at F32 where a weight is beyond F16."""
    try:
        expand_file(base, own / "f16.gguf")
    except EvaluationError:
        expand_file(base, own / "f32.gguf", bits=32)
        return agreement.measure(own / "f32.gguf", ids, logits)
    return agreement.measure(own / "f16.gguf", ids, logits)


class _Refusal(Exception):
    """transformers does not load it whole."""


def _reference(path: Path, ids: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Logits of transformers, or of PEFT on it, in float32; and the ids that end a text."""
    from transformers import AutoModelForCausalLM

    adapter = path / "adapter_config.json"
    base = path
    if adapter.is_file():
        base = Path(json.loads(adapter.read_text())["base_model_name_or_path"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stale = _without_stale_quantization(base)
            model, loading = AutoModelForCausalLM.from_pretrained(
                base,
                config=stale,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:
            raise _Refusal(f"{type(error).__name__}: {str(error)[:300]}") from None
        if loading["missing_keys"] or loading["mismatched_keys"]:
            raise _Refusal(f"{loading['missing_keys']} {loading['mismatched_keys']}"[:300])
        if adapter.is_file():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path)
    model.config.use_cache = False
    with torch.no_grad():
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        logits = model(input_ids=tokens, use_cache=False, return_dict=True).logits[0]
    ends: list[int] = []
    for said in (model.config, model.generation_config):
        value = getattr(said, "eos_token_id", None)
        ends += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    n = logits.shape[1]
    return logits.float().numpy(), sorted({end for end in ends if 0 <= end < n})


def _without_stale_quantization(folder: Path) -> Any:
    """The config without settings of a quantization that the (plain) weights do not have."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(found, "quantization_config", None) is not None:
        del found.quantization_config
    return found


def _vocabulary_fault(path: Path, base: Path) -> str:
    """The first id whose text in the GGUF is not the tokenizer's."""
    from transformers import AutoTokenizer

    settings = path / "adapter_config.json"
    where = path
    if settings.is_file() and not (path / "tokenizer_config.json").is_file():
        where = Path(json.loads(settings.read_text())["base_model_name_or_path"])
    config = _without_stale_quantization(where)
    tokenizer = AutoTokenizer.from_pretrained(where, config=config, trust_remote_code=False)
    stored = GgufFile(base).metadata["tokenizer.ggml.tokens"]
    for token, i in tokenizer.get_vocab().items():
        if i >= len(stored) or stored[i] != token:
            return f"id {i} is {token!r}, in the file {stored[i : i + 1]!r}"
    return ""


def _ends_fault(base: Path, ends: list[int]) -> str:
    """The first id that ends a text for transformers and not for llama.cpp."""
    import ctypes

    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(base).encode(), parameters)
    vocab = llama_cpp.llama_model_get_vocab(model)
    missed = [end for end in ends if not llama_cpp.llama_vocab_is_eog(vocab, ctypes.c_int32(end))]
    llama_cpp.llama_model_free(model)
    return f"{missed} do not end a text" if missed else ""
