"""calibrate: text becomes tokens, and tokens become the activation statistics of every linear
layer.

Writes `tokens.safetensors` (train and heldout sequences), `eval/<domain>.txt` (text that nothing
before validation sees),
`hessians/block-NNN.safetensors` and `hessians/head.safetensors` (two Hessians per distinct input:
train and heldout),
`hessians/embedding.safetensors` (the gradients' outer products at what is looked up),
`hessians/fisher.safetensors` (what output errors cost),
`imatrix.gguf` (the diagonals, as llama-imatrix writes them) and `calibration.json`. The unit of
work is one block: after a kill, blocks whose file is there are only run forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from quantkit import hub
from quantkit.calibration import sources
from quantkit.calibration.documents import EVAL_TOKENS, N_CTX, Domain, interleave, pack, split
from quantkit.calibration.mix import Mix, Reader
from quantkit.config.calibration import shown
from quantkit.errors import QuantkitError
from quantkit.files import PARTIAL, replacing, write_json
from quantkit.gguf_file.imatrix import write_imatrix
from quantkit.machine.memory import free_memory
from quantkit.model.blockwise import BlockwiseModel, compute_dtype, load_tokenizer
from quantkit.model.offload import States
from quantkit.model.row_maps import load_row_maps
from quantkit.run.folder import read_json
from quantkit.run.stage import StageResult
from quantkit.stages import fetch, open_model
from quantkit.statistics.experts import ExpertCollector
from quantkit.statistics.fisher import output_fisher
from quantkit.statistics.hessian import HessianCollector, is_linear
from quantkit.statistics.stored import (
    block_file,
    embedding_file,
    fisher_file,
    head_file,
    save_fisher,
    save_statistics,
)

if TYPE_CHECKING:
    from quantkit.run.stage import Run

NAME = "calibrate"
VERSION = 4
FIELDS = ("calibration", "profile", "seed", "device")

_TOKENS, _MIX = "tokens.safetensors", "mix.json"
_BATCH_TOKENS = 4096  # per forward call
_FISHER_TOKENS = 4096  # gradients are averaged over all positions: few tokens price a layer well
_ACTIVATIONS_SHARE = 0.25  # of the free memory; what is more lies in a file


def execute(run: Run) -> StageResult:
    """Raises QuantkitError for texts that cannot be read and activations that are not finite."""
    folder = run.dir.stage_dir(NAME)
    snapshot = fetch.load(run.dir)
    dtype = compute_dtype(run.config.device)
    model = open_model(run, NAME, snapshot.folder, dtype, run.config.device)
    tokenizer = load_tokenizer(snapshot.folder)
    about = _write_texts(run, model, tokenizer, folder)
    tokens_path, report_path = folder / _TOKENS, folder / "calibration.json"
    stored = load_file(tokens_path)
    tokens = {part: stored[part] for part in ("train", "heldout")}
    outputs = [tokens_path, *(folder / "eval" / name for name in about["eval"])]
    statistics = _collect(run, model, tokens, folder)
    if not fisher_file(folder).exists():
        ids = torch.from_numpy(tokens["heldout"][: max(1, _FISHER_TOKENS // N_CTX)])
        lookups = {part: HessianCollector({}) for part in tokens}
        fisher = output_fisher(model, ids, run.config.seed, lookups)
        save_statistics(embedding_file(folder), lookups, in_blocks=False)
        save_fisher(fisher_file(folder), fisher)
    maps = load_row_maps(run.dir.stage_dir("convert") / "rowmaps.safetensors")
    importances = {
        name: (m.in_file_order(statistics[m.module].diagonal), statistics[m.module].n_tokens)
        for name, m in maps.items()
        if m.module in statistics and statistics[m.module].in_blocks
    }
    imatrix_path = folder / "imatrix.gguf"
    names = [f"{row['name']} ({row['source']})" for row in about["domains"]]
    write_imatrix(imatrix_path, importances, names, len(tokens["train"]), N_CTX)
    report = {
        "spec": shown(run.config.calibration),
        **{key: about[key] for key in ("note", "domains", "languages")},
        "n_tokens": {part: int(ids.size) for part, ids in tokens.items()},
        "n_ctx": N_CTX,
        "n_imatrix_entries": len(importances),
        "seed": run.config.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    outputs += [
        write_json(report_path, report),
        imatrix_path,
        *sorted((folder / "hessians").glob("*.safetensors")),
    ]
    return StageResult(outputs, {"n_tokens": report["n_tokens"], "note": about["note"]})


def is_intermediate(path: str) -> bool:
    """Hessians are only needed by the quantize stage."""
    return "/hessians/" in path


def last_reader(path: str) -> str:
    """Hessians are large, and not looked at after their stage."""
    return "quantize" if is_intermediate(path) else "publish"


def _write_texts(run: Run, model: BlockwiseModel, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write the tokens and the texts to validate on; what the report says of them. Once: a killed
    stage goes on with the text that it began with, for neither the Hub nor a model gives the same
    text again everywhere.
    """
    path = folder / _MIX
    known: dict[str, Any] = read_json(path) if path.exists() else {}
    texts_there = all((folder / "eval" / name).exists() for name in known.get("eval", ()))
    if known and texts_there and (folder / _TOKENS).exists():
        run.events.emit(NAME, "note", f"going on with the text that was read: {known['note']}")
        return known
    mix = _read_mix(run, model, tokenizer)
    tokens = _tokens(run, mix.domains, tokenizer)
    with replacing(folder / _TOKENS) as partial:
        save_file(tokens, partial)
    texts = _eval_texts(run, mix.domains, tokenizer)
    for name, text in texts.items():
        with replacing(folder / "eval" / f"{name}.txt") as partial:
            partial.write_text(text, "utf-8", newline="")
    about = {
        "note": mix.note,
        "domains": sources.describe(mix.domains),
        "languages": {code: round(bits, 3) for code, bits in mix.languages.items()},
        "eval": [f"{name}.txt" for name in texts],
    }
    write_json(path, about)
    return about


def _read_mix(run: Run, model: BlockwiseModel, tokenizer: Any) -> Mix:
    """The calibration mix as documents."""

    def progress(done: int, total: int, message: str) -> None:
        run.events.progress(NAME, done, total, message)

    profile = run.profile
    token, seed = hub.resolve_token(), run.config.seed
    reader = Reader(model.model, tokenizer, token, seed, progress, model.is_streamed)
    n_tokens = profile.calibration_tokens + profile.heldout_tokens
    mix = reader.mix(run.config.calibration, n_tokens, profile.eval_windows * N_CTX)
    run.events.emit(NAME, "note", mix.note)
    return mix


def _tokens(
    run: Run, domains: Sequence[tuple[Domain, float]], tokenizer: Any
) -> dict[str, np.ndarray]:
    """Sequences of the train and heldout parts, domains interleaved by weight: int64 (n, N_CTX)
    each.
    """
    wanted = {"train": run.profile.calibration_tokens, "heldout": run.profile.heldout_tokens}
    parts = [split(domain, run.config.seed) for domain, _ in domains]
    weights = [weight for _, weight in domains]
    tokens = {}
    for part, n_tokens in wanted.items():
        n = n_tokens // N_CTX
        packed = [pack(p[part], tokenizer, n, N_CTX) for p in parts]
        tokens[part] = interleave(packed, weights, n)
        if len(tokens[part]) < n:
            run.events.emit(
                NAME,
                "note",
                f"only {tokens[part].size} of {n_tokens} {part} tokens: the text is short",
            )
        if not len(tokens[part]):
            raise QuantkitError(
                f"The calibration text has fewer than {N_CTX} tokens to {part}.", "Give more text."
            )
    return tokens


def _eval_texts(
    run: Run, domains: Sequence[tuple[Domain, float]], tokenizer: Any
) -> dict[str, str]:
    """What is held out of each domain for validation, by a name for its file. Domains with less
    than a window of it are left out: better now than after the long work.
    """
    found: dict[str, str] = {}
    for domain, _ in domains:
        text = "\n\n".join(split(domain, run.config.seed)["eval"])
        if len(tokenizer(text, verbose=False).input_ids) < EVAL_TOKENS:
            run.events.emit(NAME, "note", f"{domain.name} has too little text to validate on")
            continue
        name = Path(domain.name).stem
        while name in found:  # notes.txt and notes.jsonl
            name += "-"
        found[name] = text
    if not found and run.config.eval_text is None:
        raise QuantkitError(
            f"No calibration text is long enough to hold {EVAL_TOKENS} tokens of it out for"
            " validation.",
            "Give more text, or a text to validate on with --eval-text.",
        )
    return found


def _collect(
    run: Run, model: BlockwiseModel, tokens: dict[str, np.ndarray], folder: Path
) -> dict[str, Any]:
    """Run all blocks over all tokens; write each block's Hessians. Returns the diagonals by
    module.
    """
    device = run.config.device
    batches = [
        (part, torch.from_numpy(ids[i : i + _BATCH_TOKENS // N_CTX]).to(device))
        for part, ids in tokens.items()
        for i in range(0, len(ids), _BATCH_TOKENS // N_CTX)
    ]
    room = int(_ACTIVATIONS_SHARE * free_memory())
    states = States(folder / f"activations{PARTIAL}", room, "cpu")
    for i, (_, ids) in enumerate(batches):
        states.put(i, model.trace(ids)[0], {})
    summary: dict[str, Any] = {}
    n_blocks = len(model.blocks)
    for index in range(n_blocks):
        path = block_file(folder, index)
        prefix = model.block_name(index)
        linears = {
            f"{prefix}.{n}": m for n, m in model.blocks[index].named_modules() if is_linear(m)
        }
        collectors = {part: HessianCollector(linears) for part in tokens}
        with model.holding(index):
            experts = {
                part: ExpertCollector(model.blocks[index], prefix, ids.size)
                for part, ids in tokens.items()
            }
            for i, (part, ids) in enumerate(batches):
                hidden, left = states.get(i, device)
                call = model.trace(ids)[1][index].with_left(left)
                with torch.no_grad(), ExitStack() as stack:
                    if not path.exists():
                        stack.enter_context(collectors[part].watching())
                        stack.enter_context(experts[part].watching())
                    hidden = model.run_block(index, hidden, call)
                states.put(i, hidden, left)
        summary |= save_statistics(path, collectors, in_blocks=True, experts=experts)
        run.events.progress(
            NAME, index + 1, n_blocks + 1, f"block {index + 1} of {n_blocks}: activations"
        )
    path = head_file(folder)
    collectors = {part: HessianCollector(model.head_linears()) for part in tokens}
    if not path.exists():
        for i, (part, _) in enumerate(batches):
            with collectors[part].watching():
                model.head_input(states.get(i, device)[0])
    states.clear()
    summary |= save_statistics(path, collectors, in_blocks=False)
    run.events.progress(NAME, n_blocks + 1, n_blocks + 1, "activations are done")
    return summary
