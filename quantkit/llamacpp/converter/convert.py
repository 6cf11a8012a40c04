"""Convert a snapshot to `base.gguf`, or to its skeleton, with the sandboxed converter."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.info import name_of
from quantkit.checkpoint.weight_files import few
from quantkit.files import PARTIAL, replacing
from quantkit.llamacpp.converter import pretokenizer, sandbox
from quantkit.llamacpp.converter.explain import explain, tokenizer_hash, unknown_tokenizer
from quantkit.llamacpp.converter.floor import check_floor
from quantkit.llamacpp.converter.install import describe, ensure_converter
from quantkit.llamacpp.converter.sandbox import Progress, limits_for
from quantkit.llamacpp.converter.snapshot import Snapshot, sanitize
from quantkit.llamacpp.tokens import Tokens, judged
from quantkit.sandbox import Limits
from quantkit.sandbox.outcome import plain

log = logging.getLogger(__name__)

OUTTYPES = ("auto", "f32", "f16", "bf16")
_MAX_WARNINGS, _LONGEST_WARNING = 20, 500
# What transformers 5 calls a RoPE without scaling; the converter writes none, as it should.
_NOISE = {"Unknown RoPE type: default"}


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion, with notes about it."""

    path: Path
    n_bytes: int
    seconds: float
    peak_bytes: int  # resident memory of the child
    converter: str  # version and hash
    network: str  # by what means the child had none
    sandbox: str  # what else the kernel kept it from
    warnings: tuple[str, ...]  # said by the converter, about a choice made for it, or the sandbox
    removed: tuple[str, ...]  # what the sanitized copy of the model did not have
    tokens: Tokens  # whether they are the original tokenizer's

    def to_json(self) -> dict[str, object]:
        facts = {name: value for name, value in self.__dict__.items() if name != "tokens"}
        return {**facts, "path": str(self.path)}


def convert(
    snapshot_dir: Path,
    out_path: Path,
    *,
    outtype: str = "auto",
    skeleton: bool = False,
    projector: bool = False,
    model_name: str | None = None,
    left_out: Collection[str] = (),
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> ConversionResult:
    """Write the GGUF of a snapshot to `out_path`, whole or not at all, and the log next to it.

    outtype     f32, f16, bf16, or auto: the 16-bit type that the weights have
    skeleton    only the header is real, the tensor data is a hole. Works on shells
                (safetensors.write_shell), takes seconds and no disk
    projector   not the language model but what it sees or hears with (`mmproj`)
    model_name  `owner/name`; where general.name, size label and the like come from. By default the
                name of the folder, or of the repository for a folder in the Hub's cache
    left_out    tensors of the checkpoint that are not converted: no part of the model
    metadata    GGUF keys (`general.author`, ...) to set whatever the model card says
    progress    called with (bytes written, bytes in all); not for a skeleton
    limits      by default generous ones that grow with the weights

    Raises QuantkitError with the reason and what to do about it.
    """
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype is one of {', '.join(OUTTYPES)}, not {outtype}")
    started = time.monotonic()
    out_path = out_path.absolute()
    log_path = out_path.with_name("mmproj.log" if projector else "convert.log")
    check_floor()
    tree = ensure_converter()
    with _work_folder(out_path) as work:
        name = model_name or name_of(snapshot_dir)
        model = sanitize(snapshot_dir, work / "model", name, left_out)
        limits = limits or _limits(model, skeleton)
        overrides = work / "metadata.json"
        overrides.write_text(json.dumps(dict(metadata or {})), encoding="utf-8")
        arguments = [str(model.folder), "--outtype", outtype, "--metadata", str(overrides)]
        arguments += ["--outfile", str(out_path) + PARTIAL]
        if projector:
            arguments.append("--mmproj")
        notes: list[str] = []
        with replacing(out_path) as partial:

            def attempt(pre: str | None) -> sandbox.Outcome:
                return sandbox.run(
                    "convert",
                    tree,
                    log_path,
                    limits,
                    readable=model.readable + (overrides,),
                    output=partial,
                    progress=None if skeleton else progress,
                    script=str(tree / "convert_hf_to_gguf.py"),
                    arguments=arguments,
                    skeleton=skeleton,
                    left_out=sorted(left_out),
                    pre=pre,
                    probes=pretokenizer.PROBES,
                )

            outcome = attempt(None)
            if outcome.ok and outcome.said.plain:  # a tokenizer the converter does not know
                log.info("Unknown tokenizer: looking for a pre-tokenizer that splits as it does.")
                pre = pretokenizer.find(tree, partial, outcome.said, work / "match.log")
                if pre is None:
                    raise unknown_tokenizer(outcome, log_path)
                notes.append(
                    f"The converter does not know the tokenizer (hash {tokenizer_hash(outcome)}); "
                    f"pre-tokenizer {pre.matching} is used because llama.cpp then gives the same "
                    f"tokens for all {len(pretokenizer.PROBES)} probe texts."
                )
                if not pre.same_special:
                    notes.append(
                        "llama.cpp puts other special tokens before or after a text than the "
                        "original tokenizer does: check add_bos_token in the result."
                    )
                if outcome.said.composes:
                    notes.append(
                        "The tokenizer composes accents that are written as letter and mark (NFC), "
                        "but llama.cpp does not: such texts get other tokens."
                    )
                outcome = attempt(pre.matching)
            if not outcome.ok or partial.stat().st_size == 0:
                raise explain(outcome, log_path, model.removed)
            tokens = judged(outcome.said.tokens or {"error": "the file has no tokens"})
            if outcome.said.missed_ends:
                notes.append(
                    "The GGUF has no key left for all ends of a turn: llama.cpp does not stop at "
                    f"{few(outcome.said.missed_ends)}."
                )
    return ConversionResult(
        path=out_path,
        n_bytes=out_path.stat().st_size,
        seconds=round(time.monotonic() - started, 2),
        peak_bytes=outcome.ended.peak_bytes,
        converter=describe(tree),
        network=outcome.ended.protection.network,
        sandbox=str(outcome.ended.protection),
        warnings=(*notes, *_warnings(outcome.ended.log), *outcome.ended.protection.missing),
        removed=model.removed,
        tokens=tokens,
    )


@contextmanager
def _work_folder(out_path: Path) -> Iterator[Path]:
    """A folder next to the output, gone afterwards; what a killed conversion left is cleared first.
    Nor does a partial output stay: it may be as large as the model.
    """
    work = out_path.with_name(out_path.name + ".work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        out_path.with_name(out_path.name + PARTIAL).unlink(missing_ok=True)


def _limits(model: Snapshot, skeleton: bool) -> Limits:
    """By what the headers say, and what the machine has."""
    from quantkit.machine.memory import free_memory  # needs torch

    counts: Counter[str] = Counter()  # experts are stacked: their parts become one tensor
    for name, tensor in model.tensors.items():
        counts[re.sub(r"\bexperts\.\d+\.", "experts.", name)] += tensor.n_elements
    largest = 0 if skeleton else max(counts.values(), default=0)
    return limits_for(model.weight_bytes, _output_bytes(model), largest, free_memory())


def _output_bytes(model: Snapshot) -> int:
    """More than any GGUF of these weights has: types of 16 bits and up at most double (norms become
    float32), packed integers of 2 bits or more grow sixteenfold.
    """
    growth = {"F64": 1, "F32": 1, "F16": 2, "BF16": 2}
    return sum(
        t.n_bytes * growth.get(t.dtype, 4 if t.dtype.startswith("F8") else 16)
        for t in model.tensors.values()
    )


def _warnings(text: str) -> list[str]:
    """The converter's own warnings, once each, without those of libraries."""
    found = re.findall(r"^WARNING:(?:hf-to-gguf|gguf[\w.]*|metadata):(.*\S.*)$", text, re.MULTILINE)
    lines = dict.fromkeys(plain(line)[:_LONGEST_WARNING] for line in found)
    return [x for x in lines if x not in _NOISE and not x.startswith("*")][:_MAX_WARNINGS]
