"""Check that `base.gguf` is the model: compare its logits in llama.cpp with those of the model as
transformers (and PEFT, for an adapter) loads it from the user's own files, on the tokens of a
rendered chat.

Whole in float32 where that fits into memory; else over fewer tokens by accelerate's disk offload. A
comparison that was not made is a check that failed; one that shows another model ends the run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from evaluators.figures import Agreement
from quantkit import sandbox
from quantkit.checkpoint.weight_files import few
from quantkit.errors import QuantkitError
from quantkit.evidence.integrity import logits_check
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp import templates
from quantkit.llamacpp.tokens import MOST_IDS
from quantkit.machine.memory import free_memory
from quantkit.planning.memory import PARITY_LEFT, offloaded_bytes, parity_fits
from quantkit.run.check import Check
from quantkit.sandbox.outcome import plain

NAME = "logits of base.gguf against the original's"
COPY = "the expanded copy, loaded by transformers"
MERGED = "the merged copy, loaded by transformers"
_N_OFFLOADED = 64

# The largest mean KL in nats of a right file. Of 22 of tests/support/families.py the largest is
# 3e-4 as BF16, to whose 8 bits llama.cpp rounds activations, too; of 13 expanded to F16 it is 4e-5.
# So from half the limit on a file is expanded first. 32 wrong rows of one tensor cost 7e-3 to 2.
LIMIT = 1e-3
_CLOSER_ABOVE = LIMIT / 2
_COARSE_LIMIT = 1e-2  # where BF16 or 8-bit activations could not be had out of the way


@dataclass(frozen=True)
class Original:
    """Where an oracle finds the model: `adapter` is laid over it by PEFT."""

    name: str
    folder: Path
    adapter: Path | None = None

    def to_json(self) -> dict[str, str | None]:
        """Return it as `evaluators.oracle.compare` takes it."""
        adapter = None if self.adapter is None else str(self.adapter)
        return {"name": self.name, "folder": str(self.folder), "adapter": adapter}

    def readable(self) -> tuple[Path, ...]:
        """Return what must be shown to a process that loads it."""
        folders = (self.folder, *([] if self.adapter is None else [self.adapter]))
        return tuple(path for folder in folders for path in templates.readable(folder))


class _Tried(TypedDict):
    oracle: str
    passed_over: list[str]


class Found(_Tried, total=False):
    """The answer of `evaluators.oracle.compare`."""

    missing: list[str]
    not_finite: bool
    error: str
    agreement: Agreement
    first: int | None
    expanded: str
    not_expanded: str


def check_logits(
    base: GgufFile, ids: Sequence[int], originals: Sequence[Original], folder: Path
) -> tuple[Check, Found]:
    """Compare `base` with the first of `originals` that loads: the check, and what was measured.

    Args:
        ids: tokens of a text by the original tokenizer.
        folder: for the log, and for what is written on the way.

    Raises:
        QuantkitError: the two are not one model, or the checkpoint lacks weights.
    """
    whole, free = 4 * base.n_elements, free_memory()
    fits = parity_fits(base.n_elements, free)
    kept = whole - offloaded_bytes(base.n_elements, free)  # bytes of weights in memory
    with tempfile.TemporaryDirectory(dir=folder, prefix="parity-") as scratch:
        found: Found = {"oracle": "", "passed_over": []}
        try:
            for part in sandbox.stream(
                "evaluators.oracle:compare",
                {
                    "file": str(base.path),
                    "ids": list(ids),
                    "sources": [original.to_json() for original in originals],
                    "n_tokens": min(MOST_IDS if fits else _N_OFFLOADED, base.context_length),
                    "scratch": scratch,
                    "offloaded": not fits,
                    "offload_bytes": kept,
                    "closer_above": _CLOSER_ABOVE,
                },
                limits=_limits(base, kept),
                readable=(base.path, *(path for o in originals for path in o.readable())),
                writable=[Path(scratch)],
                log=folder / "parity.log",
                shape=Found,
                preload=True,
            ):
                found = part
        except QuantkitError as error:
            found = {"error": error.message, **found, "not_expanded": error.message}
    return judged(base, found), found


def judged(base: GgufFile, found: Found) -> Check:
    """Turn an outcome of `evaluators.oracle.compare` into a check. Raises QuantkitError when it
    shows that the file is not the model.
    """
    by = plain(found["oracle"])
    if found.get("missing"):
        raise QuantkitError(
            f"The checkpoint lacks weights, which transformers would draw at random:"
            f" {few(found['missing'])}.",
            "Download the model again, or use another revision.",
        )
    if found.get("not_finite"):
        raise QuantkitError(
            "base.gguf gives logits that are not finite numbers in llama.cpp, which keeps keys and"
            " values in 16 bits.",
            "A weight of the checkpoint is far larger than the others: use another revision.",
        )
    if "agreement" not in found:
        why = plain(found.get("error", "no reason is given"))
        return Check(NAME, False, f"not compared: {why.rstrip('.')}")
    limit = _COARSE_LIMIT if found.get("not_expanded") else LIMIT
    check = logits_check(NAME, base, found["agreement"], limit)
    expanded = f", expanded to {plain(found['expanded'])}" if found.get("expanded") else ""
    said = f"{check.about}, by {by}{expanded}"
    if not check.passed:
        first = found.get("first")
        where = "" if first is None else f", first at token {first}"
        raise QuantkitError(
            f"base.gguf is not the model that was given: {said}{where}.",
            "Its files may not belong together, or llama.cpp computes its architecture in"
            " another way: please open an issue with the model's id.",
        )
    return Check(NAME, True, "; ".join([said, *map(plain, found["passed_over"])]))


def _limits(base: GgufFile, weight_bytes: int) -> sandbox.Limits:
    """Room for `weight_bytes` in memory beside the file, which is mapped; a slow disk is read at
    some 20 MB a second.
    """
    gigabytes = 1 + base.n_bytes // 10**9
    return sandbox.Limits(
        cpu_seconds=1800 + 600 * gigabytes,
        wall_seconds=1800 + 300 * gigabytes,
        memory_bytes=2 * weight_bytes + 2 * PARITY_LEFT,
        file_bytes=10 * base.n_elements + 2**30,  # offloaded in 32 bits, and expanded
        n_processes=64 + 8 * (os.cpu_count() or 1),  # threads
    )
