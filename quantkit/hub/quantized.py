"""Sources that are quantized already: which can be expanded to 16 bits, and which are refused.

Known before a weight is downloaded, from `quantization_config` and the headers. Expanding is done
by `quantkit.dequantize`; MXFP4 stays as it is, because GGUF stores its blocks bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.safetensors_file import StoredTensor

FP8, GPTQ, AWQ, MXFP4 = "FP8", "GPTQ", "AWQ", "MXFP4"
_SCALES = ("weight_scale_inv", "weight_scale")
_BESIDE = (*_SCALES, "input_scale", "activation_scale", "input_scale_inv")
_PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Source:
    """How a checkpoint is quantized. `block` is (rows, columns) of one FP8 scale where they are
    blocks; `bits`, `group` and `zero_offset` are those of packed integers.
    """

    scheme: str
    block: tuple[int, int] | None = None
    bits: int = 0
    group: int = 0
    zero_offset: int = 0

    @property
    def is_expanded(self) -> bool:
        return self.scheme != MXFP4

    def sentence(self, bases: Sequence[str]) -> str:
        """What plan, log and card say."""
        if not self.is_expanded:
            return (
                f"The source is stored in {self.scheme}: those tensors keep their type, the others"
                " are quantized."
            )
        better = f" {bases[0]} may have the full weights." if bases else ""
        return (
            f"The source is quantized itself ({self.scheme}): it was expanded to 16 bits, and what"
            f" it had lost stays lost.{better}"
        )


@dataclass(frozen=True)
class Expanded:
    """A tensor of the 16-bit checkpoint, and the stored ones that it is made of."""

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # the first holds the weights


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a model or of its text model."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("quantization_config"), dict):
            return dict(part["quantization_config"])
    return None


class CannotExpand(QuantkitError):
    """A model is quantized in a way that is not undone here."""


def source_of(model: str, config: Mapping[str, Any], bases: Sequence[str]) -> Source | None:
    """How the model is quantized, None if it is not. Raises QuantkitError, with the alternative,
    for what cannot be expanded exactly as its own runtime would.
    """
    settings = quantization_of(config)
    if settings is None:
        return None
    method = str(settings.get("quant_method") or "unknown").lower()
    if method == "mxfp4":
        return Source(MXFP4)
    is_fp8 = (
        method in ("fp8", "fbgemm_fp8")
        or (method == "compressed-tensors" and settings.get("format") == "float-quantized")
        or (method == "modelopt" and settings.get("quant_algo") == "FP8")
    )
    if is_fp8:
        block = settings.get("weight_block_size")
        pair = (
            (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
        )
        return Source(FP8, pair)
    bits, group = settings.get("bits"), settings.get("group_size")
    if method == "gptq" and bits in (2, 4, 8) and isinstance(group, int):
        offset = 0 if settings.get("checkpoint_format", "gptq") == "gptq_v2" else 1
        return Source(GPTQ, bits=int(bits), group=group, zero_offset=offset)
    version = str(settings.get("version") or "gemm").lower()
    if method == "awq" and bits == 4 and version == "gemm" and isinstance(group, int):
        return Source(AWQ, bits=4, group=group)
    name = {"bitsandbytes": "bitsandbytes", "gptq": f"GPTQ at {bits} bits"}.get(method, method)
    raise CannotExpand(
        f"{model} is quantized already ({name}), in a way that is not undone here.",
        f"Give the original instead: {bases[0] if bases else 'the model it was made from'}.",
    )


def expanded(source: Source, tensors: Mapping[str, StoredTensor]) -> dict[str, Expanded]:
    """The tensors of the 16-bit checkpoint. Raises QuantkitError where parts are missing."""
    made: dict[str, Expanded] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if source.scheme == FP8:
            of = tensors.get(name.removesuffix("_inv").removesuffix("_scale"))
            if last in _BESIDE or (of is not None and of != tensor and of.dtype.startswith("F8")):
                continue
            if tensor.dtype.startswith("F8"):
                scales = [n for n in (f"{name}_scale_inv", f"{name}_scale") if n in tensors]
                made[name] = Expanded("BF16", tensor.shape, (name, *scales[:1]))
                continue
        elif last in _PACKED and f"{stem}.qweight" in tensors:
            if last == "qweight":
                made[f"{stem}.weight"] = _packed(source, stem, tensors)
            continue
        made[name] = Expanded(tensor.dtype, tensor.shape, (name,))
    return made


def _packed(source: Source, stem: str, tensors: Mapping[str, StoredTensor]) -> Expanded:
    parts = [f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")]
    missing = [name for name in parts if name not in tensors]
    if missing:
        raise QuantkitError(
            f"The checkpoint has {parts[0]} and no {missing[0]}.", "Use another revision."
        )
    n_rows, n_columns = tensors[parts[0]].shape
    per_word = 32 // source.bits
    n_in, n_out = (
        (n_rows * per_word, n_columns) if source.scheme == GPTQ else (n_rows, n_columns * per_word)
    )
    if f"{stem}.g_idx" in tensors:
        parts.append(f"{stem}.g_idx")
    return Expanded(tensors[parts[2]].dtype, (n_out, n_in), tuple(parts))
