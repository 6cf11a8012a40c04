"""convert: the snapshot becomes `base.gguf` in its own 16-bit type, and every GGUF row is found in
the model.

llama.cpp's own converter does the work, sandboxed (`quantkit.llamacpp.converter`). Beside the file:
`tensors.json` (shapes, types, which tensors llama.cpp lets one quantize) and `rowmaps.safetensors`
(which row of which Hugging Face weight is which row here). Of a model that sees or hears also
`mmproj.gguf`, the encoder in 16 bits, which llama.cpp loads together with the language model.

`base.gguf` is compared with its original before anything long is done with it: every id and the
tokens of texts against the tokenizer (`llamacpp.tokens`), logits against the model as transformers
loads it from the user's own files (`evidence.parity`), and every linear layer must be found in that
model, or be missing for a reason that is known by name (`model.unmapped`). What was found is
`checks.json`, for the report.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.quantized import INTEGERS, source_of
from quantkit.checkpoint.weight_files import few
from quantkit.config import N_CTX
from quantkit.config.levels import plan_levels
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.converter.architectures import tables
from quantkit.llamacpp.converter.convert import convert
from quantkit.model.unmapped import reason_of
from quantkit.planning.plan import check_sizes, specs_of
from quantkit.run.check import Check
from quantkit.run.stage import Run, Stage, StageResult
from quantkit.sources.snapshot import Place, Snapshot, load_snapshot, model_name
from quantkit.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

    from quantkit.calibration.tokenizer import Tokenizer
    from quantkit.evidence.parity import Original
    from quantkit.model.row_maps import RowMap
    from quantkit.sources.carry import CarryOver

NAME = "convert"
_N_SEQUENCES = 4  # of each text that channels are equalized on


class Convert(Stage):
    """Write the weights as one full-precision GGUF, with llama.cpp's own converter."""

    name = NAME
    version = 5
    fields = ("equalize",)

    def execute(self, run: Run) -> StageResult:
        """Raise QuantkitError when the converter does not know the model, or nothing of it is
        found again.
        """
        from quantkit.evidence.parity import check_logits
        from quantkit.model.row_maps import save_row_maps

        snapshot = load_snapshot(run.dir)
        base_path = run.artifacts.base

        def progress(done: int, total: int) -> None:
            run.events.progress(
                NAME, done, max(done, total), "llama.cpp's converter writes base.gguf"
            )

        result = convert(
            snapshot.folder,
            base_path,
            model_name=model_name(snapshot),
            left_out=snapshot.left_out,
            progress=progress,
        )
        warnings = [f"converter: {warning}" for warning in result.warnings]
        for note in (f"sandbox: {result.sandbox}", *warnings, *result.tokens.notes):
            run.events.emit(NAME, "note", note)
        base = GgufFile(base_path)
        specs = specs_of(base)
        check_sizes(run.config, base, plan_levels(specs, run.config))  # before the long work
        quantizable = {spec.name for spec in specs.values() if spec.quantizable}
        run.events.emit(NAME, "note", "comparing base.gguf with the model that transformers loads")
        with ThreadPoolExecutor(1, "rows") as pool:  # a child of this thread compares meanwhile
            matched = pool.submit(_match_rows, run, snapshot, base, specs)
            original, folder = _originals(snapshot), run.artifacts.folder(NAME)
            logits, measured = check_logits(base, result.tokens.ids, original, folder)
            maps = matched.result()
        run.events.emit(NAME, "note", f"{logits.name}: {logits.about}")
        unmapped = sorted(quantizable - maps.keys())
        if not maps:
            raise QuantkitError(
                "No tensor of base.gguf was found in the model that transformers loads.",
                "This architecture is not supported yet: please open an issue with the model's id.",
            )
        _check_unmapped(run, base, unmapped)
        save_row_maps(maps, run.artifacts.row_maps)
        equalized, compared = _equalize(run, snapshot, original)
        found = {
            "checks": [result.tokens.check, logits, *compared],
            "apart": result.tokens.apart,
            "text": result.tokens.text,
            "logits": measured,
        }
        checks = write_json(run.artifacts.checks, found)
        over = _carry_over(run, snapshot, base, specs)
        specs = over.specs(specs)
        n_mapped = sum(specs[name].n_elements for name in maps)
        n_all = sum(specs[name].n_elements for name in quantizable)
        tensors = {
            "specs": list(specs.values()),
            "unmapped": unmapped,
            "conversion": result.to_json(),
            "carried": over.carried,
            "not_carried": over.missed,
        }
        outputs = [
            base_path,
            write_json(run.artifacts.specs, tensors),
            run.artifacts.row_maps,
            checks,
        ]
        outputs += [*equalized, *sorted(run.artifacts.carried.glob("*"))]
        if _make_projector(run, snapshot, run.artifacts.projector):
            outputs.append(run.artifacts.projector)
        summary = {
            "n_bytes": result.n_bytes,
            "mapped_share": round(n_mapped / n_all, 4),
            "unmapped": unmapped,
        }
        if over.carried or over.missed:
            summary["carried"] = sum(row.is_exact for row in over.carried)
        return StageResult(outputs, summary)

    def last_reader(self, path: str) -> str:
        """Only the encoder is published."""
        return "publish" if path.endswith("mmproj.gguf") else "validate"


def _equalize(
    run: Run, snapshot: Snapshot, original: Sequence[Original]
) -> tuple[list[Path], list[Check]]:
    """Write the model once more with its channels equalized, where that is asked for: the files,
    and their comparison with the original.
    """
    made = run.artifacts
    shutil.rmtree(made.equalized, ignore_errors=True)
    for path in (made.equalized_base, made.powers):
        path.unlink(missing_ok=True)
    if not run.config.equalize:
        return [], []
    from quantkit.calibration.tokenizer import Tokenizer
    from quantkit.evidence.parity import check_logits
    from quantkit.model.equalize import equalize
    from quantkit.model.opening import open_model
    from quantkit.sources import equalized

    def told(done: int, total: int) -> None:
        run.events.progress(NAME, done, total, "equalizing the channels of every block")

    model = open_model(run, NAME, snapshot.folder, device=run.config.device)
    powers = equalize(model, _sample(Tokenizer(snapshot.folder)), told)
    del model
    files = equalized.write(snapshot.folder, Place.of(snapshot).files, powers, made.equalized)
    result = convert(
        made.equalized,
        made.equalized_base,
        model_name=model_name(snapshot),
        left_out=snapshot.left_out,
    )
    base, folder = GgufFile(made.equalized_base), made.folder(NAME)
    check, _ = check_logits(base, result.tokens.ids, original, folder)
    check = replace(check, name="logits of the equalized model against the original's")
    run.events.emit(NAME, "note", f"{check.name}: {check.about}")
    return [made.equalized_base, powers.save(made.powers), *files], [check]


def _sample(tokenizer: Tokenizer) -> torch.Tensor:
    """The text that channels are equalized on: prose and code, int64 (n_sequences, N_CTX). Where
    outliers are depends on the model more than on the text.
    """
    import torch

    from quantkit.calibration.sources import builtin_text

    rows = []
    for name in ("docs", "code"):
        text = builtin_text(name, 16 * N_CTX * _N_SEQUENCES)
        assert text is not None
        ids = tokenizer("\n\n".join(text.documents), verbose=False).input_ids
        rows += [ids[i : i + N_CTX] for i in range(0, N_CTX * _N_SEQUENCES, N_CTX)]
    return torch.tensor([row for row in rows if len(row) == N_CTX])


def _carry_over(
    run: Run, snapshot: Snapshot, base: GgufFile, specs: Mapping[str, TensorSpec]
) -> CarryOver:
    """Keep what a quantized source has on grids that GGUF's types hold."""
    from quantkit.sources.carry import CarryOver, carry_over

    info = snapshot.info
    source = source_of(info.id, info.config, info.base_model)
    shutil.rmtree(run.artifacts.carried, ignore_errors=True)
    if source is None or source.scheme not in INTEGERS:
        return CarryOver()
    files = [file.path for file in info.files]
    found = carry_over(_own(info), files, source, base, specs, run.artifacts.carried)
    n_exact = sum(row.is_exact for row in found.carried)
    missed = f", {len(found.missed)} do not" if found.missed else ""
    about = f"{n_exact} tensors of the source lie exactly on grids of GGUF's types{missed}"
    run.events.emit(NAME, "note", about)
    return found


def _match_rows(
    run: Run, snapshot: Snapshot, base: GgufFile, specs: Mapping[str, TensorSpec]
) -> dict[str, RowMap]:
    """Where the rows of quantizable tensors come from, as far as they are the model's."""
    from quantkit.model.opening import open_model
    from quantkit.model.row_maps import RowMatcher

    model = open_model(run, NAME, snapshot.folder)
    matcher = RowMatcher(model.model, model.weight)
    found = {
        spec.name: matcher.match(spec, base.packed(spec.name))
        for spec in specs.values()
        if spec.quantizable
    }
    return {name: map_ for name, map_ in found.items() if map_ is not None}


def _originals(snapshot: Snapshot) -> list[Original]:
    """Where the model lies as its author made it, not as fetch wrote it again. PEFT is the judge of
    adapters where it is installed.
    """
    from quantkit.evidence.parity import COPY, MERGED, Original

    info = snapshot.info
    if info.base is not None:
        merged = Original(f"transformers on {MERGED}", snapshot.folder)
        if importlib.util.find_spec("peft") is None:
            return [Original(f"{merged.name} (PEFT is not installed)", snapshot.folder)]
        return [Original("PEFT on transformers", _own(info.base), _own(info)), merged]
    source = source_of(info.id, info.config, info.base_model)
    if source is not None and source.is_expanded:
        return [Original("transformers", _own(info)), Original(COPY, snapshot.folder)]
    return [Original("transformers", snapshot.folder)]


def _own(info: ModelInfo) -> Path:
    """The folder with the files as they were fetched; what the cache has lost comes again."""
    folder = hub.cached_folder(info)
    if hub.damaged_files(info, folder):
        folder = hub.download(info, hub.resolve_token())
    return folder


def _check_unmapped(run: Run, base: GgufFile, unmapped: list[str]) -> None:
    """Raise QuantkitError for linear layers that should be in the model and are not."""
    reasons = {name: reason_of(base.metadata, name) for name in unmapped}
    lost = [name for name, reason in reasons.items() if reason is None]
    if lost:
        raise QuantkitError(
            f"Linear layers of base.gguf are not found in the model that transformers loads:"
            f" {few(lost)}.",
            "The model's files may not belong together; else its architecture is not supported"
            " yet: please open an issue with its id.",
        )
    for reason in sorted({reason for reason in reasons.values() if reason}):
        n = sum(found == reason for found in reasons.values())
        run.events.emit(
            NAME, "note", f"{n} tensors are not calibrated, because they belong to {reason}"
        )


def _make_projector(run: Run, snapshot: Snapshot, path: Path) -> bool:
    """Convert the model's encoder. What cannot be converted is said: the language model is whole
    without it.
    """
    info = snapshot.info
    if info.architectures[0] not in tables().mmproj:
        return False
    try:
        convert(
            snapshot.folder, path, outtype="f16", projector=True, model_name=model_name(snapshot)
        )
    except QuantkitError as error:
        run.events.emit(NAME, "note", f"no mmproj, so the result only reads text: {error.message}")
        return False
    return True
