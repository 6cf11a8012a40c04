"""Check that the stitched file is what it should be.

The weights decode to the same bits here and in llama.cpp, everything that is not a weight is the
base's, and PyTorch computes with those weights what llama.cpp computes with the file. A file whose
weights or metadata are wrong is an error; logits that disagree are shown, because there the fault
may lie in either of two implementations of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluators.figures import Agreement
from quantkit.errors import QuantkitError
from quantkit.ggml import native
from quantkit.gguf_file.read import GgufFile, StoredTensor
from quantkit.model.unmapped import reason_of
from quantkit.run.check import Check

if TYPE_CHECKING:
    from quantkit.model.row_maps import RowMap

# The limits of the mean KL between PyTorch and llama.cpp, in nats: at F16 only rounding is left,
# on the file itself llama.cpp's 8-bit activations.
F16_LIMIT, FILE_LIMIT = 1e-4, 1e-2
_DECLARED = ("general.file_type", "general.quantization_version", "quantize.imatrix.", "quantkit.")
_ROWS = 2048  # decoded at once: some tens of MB


def same_weights(file: GgufFile, max_rows: int | None = None) -> Check:
    """Return whether every quantized tensor has the same bits in our decoder as in llama.cpp's.

    With `max_rows` only so many rows of each tensor are looked at, spread evenly.
    """
    n_tensors, n_weights = 0, 0
    for tensor in file.tensors.values():
        if not tensor.qtype.is_quantized:
            continue
        packed = file.packed(tensor.name)
        if max_rows is not None and len(packed) > max_rows:
            packed = packed[np.linspace(0, len(packed) - 1, max_rows).astype(int)]
        for start in range(0, len(packed), _ROWS):
            rows = np.array(packed[start : start + _ROWS])
            theirs = native.dequantize(rows, tensor.qtype)
            if not np.array_equal(_decoded(rows, tensor).view("u4"), theirs.view("u4")):
                return Check(_WEIGHTS, False, f"{tensor.name} ({tensor.qtype}) decodes differently")
            n_weights += theirs.size
        n_tensors += 1
    n_all = sum(math.prod(t.shape) for t in file.tensors.values() if t.qtype.is_quantized)
    of_all = "all" if n_weights == n_all else f"{n_weights:,} of"
    about = f"{of_all} {n_all:,} weights in {n_tensors} tensors equal llama.cpp's to the bit"
    return Check(_WEIGHTS, True, about)


_WEIGHTS = "dequantized weights"


def _decoded(rows: native.Bytes, tensor: StoredTensor) -> native.Floats:
    """Rows decoded without llama.cpp: by the formats that GPTQ works on, else by gguf-py."""
    import gguf
    import torch

    from quantkit.ggml.formats import FORMATS, levels_of

    found = FORMATS.get(tensor.qtype)
    if found is None:
        values: native.Floats = gguf.quants.dequantize(
            rows, gguf.GGMLQuantizationType(tensor.qtype.ggml)
        )
        return np.ascontiguousarray(values, np.float32)
    packed = torch.from_numpy(rows)
    grid = found.grid(packed)
    levels = levels_of(found.codes(packed), grid.table).view(len(rows), -1, grid.group)
    decoded = levels * grid.scale[..., None]
    if found.dmin_at is not None:  # adding a zero would lose the sign of a zero
        decoded += grid.minimum[..., None]
    return decoded.view(len(rows), -1).numpy()


def same_frame(file: GgufFile, base: GgufFile) -> Check:
    """Return whether all but the weights is the base's: tensor names, order and shapes, every
    metadata key but the declared ones, and the bytes of tensors that kept their type.
    """
    name = "header, tokenizer, chat template"
    shapes = [[(t.name, t.shape) for t in f.tensors.values()] for f in (file, base)]
    if shapes[0] != shapes[1]:
        return Check(name, False, "the tensors differ from the base's")
    ours, theirs = file.fields, base.fields
    wrong = [
        key
        for key in sorted({*ours, *theirs})
        if not key.startswith(_DECLARED) and ours.get(key) != theirs.get(key)
    ]
    if wrong:
        return Check(name, False, f"{', '.join(wrong[:5])} differ from the base's")
    kept = [t.name for t in file.tensors.values() if t.qtype == base.tensors[t.name].qtype]
    changed = [n for n in kept if not np.array_equal(file.packed(n), base.packed(n))]
    if changed:
        return Check(name, False, f"{', '.join(changed[:5])} differ from the base's")
    n_keys = sum(not key.startswith(_DECLARED) for key in ours)
    n_declared = len(ours) - n_keys
    return Check(
        name,
        True,
        f"{n_keys} metadata keys and {len(kept)} tensors match the base; {n_declared} keys differ,"
        " as intended",
    )


def torch_logits(
    folder: Path,
    maps: Mapping[str, RowMap],
    file: GgufFile,
    ids: np.ndarray,
    device: str,
) -> native.Floats:
    """Return the logits [n, n_vocab] in float32 of the checkpoint in `folder` with the weights of
    `file`.

    Args:
        maps: the row map of each tensor of the file that differs from the base.
        ids: token ids, [n].

    Raises:
        QuantkitError: a quantized tensor has no row map, or there is too little memory.
    """
    lacking = [
        t.name
        for t in file.tensors.values()
        if t.qtype.is_quantized and t.name not in maps and reason_of(file.metadata, t.name) is None
    ]
    if lacking:
        raise QuantkitError(f"{len(lacking)} quantized tensors were not found in the model.", "")
    import torch

    from quantkit.model.streaming import open_model

    quantized = [name for name in maps if file.tensors[name].qtype.is_quantized]
    try:
        model = open_model(folder, torch.float32, device)

        def put(block: int | None) -> None:
            for name in quantized:
                if model.block_of(maps[name].parameter) == block:
                    values = torch.from_numpy(file.values(name)).to(device)
                    maps[name].scatter(values, model.model.get_parameter(maps[name].parameter))

        put(None)
        model.prepare_with(put)
        with torch.no_grad():
            tokens = torch.from_numpy(ids.astype(np.int64)).to(device)[None]
            logits = model.model(input_ids=tokens, use_cache=False).logits[0]
        return logits.float().cpu().numpy()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise QuantkitError(f"there is too little memory ({type(error).__name__}).", "") from error


def agrees(file: GgufFile, agreement: Agreement, limit: float) -> bool:
    """Return whether the mean KL of an agreement is within `limit`.

    In a mixture of experts a router's tie within rounding falls either way: there the trimmed mean
    has to be, and the mean of all tokens within ten times the limit.
    """
    if agreement.mean_kl <= limit:
        return True
    n_experts = file.metadata.get(f"{file.metadata['general.architecture']}.expert_count", 0)
    ties = bool(n_experts) and agreement.mean_kl <= 10 * limit
    return ties and bool(agreement.trimmed_kl <= limit)


def logits_check(name: str, file: GgufFile, agreement: Agreement, limit: float) -> Check:
    """Judge the agreement of a file, as `agrees` does."""
    passed = agrees(file, agreement, limit)
    about = (
        f"mean KL {agreement.mean_kl:.2g} (at most {limit:g}), same top-1"
        f" {100 * agreement.top1:.1f} %, over {agreement.n} tokens"
    )
    if passed and agreement.mean_kl > limit:
        about += (
            f"; {agreement.trimmed_kl:.2g} without the worst 2 %, where experts tie within rounding"
        )
    return Check(name, passed, about)


def chat_check(generation: Mapping[str, str]) -> Check:
    """Check that a turn through the chat template (or plain text, if there is none) gives text. A
    template that cannot be used fails the check, whatever plain text gives.
    """
    said = generation["text"].strip()
    about = f"answered {len(said)} characters through the {generation['asked']}"
    why = generation.get("template")
    return Check("chat turn", bool(said) and why is None, f"{about}; {why}" if why else about)
