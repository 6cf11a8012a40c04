"""Recognize sources that are already quantized: some can be expanded to 16 bits, others are
refused.

Known before a weight is downloaded, from `quantization_config` and the headers. Expanding is done
by `quantkit.sources.dequantize`; MXFP4 stays as it is, because GGUF stores its blocks bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.checkpoint.weight_files import shown
from quantkit.errors import QuantkitError, UsageError
from quantkit.sandbox.untrusted import Settings

FP8, GPTQ, AWQ, MXFP4, PACKED = "FP8", "GPTQ", "AWQ", "MXFP4", "compressed-tensors"
INTEGERS = (GPTQ, AWQ, PACKED)  # weights are integers times a scale
_SCALES = ("weight_scale_inv", "weight_scale")
_BESIDE = (*_SCALES, "input_scale", "activation_scale", "input_scale_inv")
_PACKED = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")

_BESIDE_INTEGERS = (*_COMPRESSED, "input_scale", "input_zero_point", "input_global_scale")

# Methods whose settings only say how weights are stored: with nothing stored so, they say nothing.
# (BitNet's, for one, also change what the model computes.)
_STORAGE = frozenset(
    "bitsandbytes gptq awq fp8 fbgemm_fp8 compressed-tensors mxfp4 modelopt auto-round quanto hqq"
    " eetq torchao aqlm vptq spqr higgs".split()
)
_PACKED_TYPES = ("U8", "I8", "I16", "U16", "I32", "U32", "F4", "F6", "F8")
PACKED_PARTS = frozenset((*_BESIDE, *_PACKED, *_COMPRESSED, "absmax", "SCB"))
_CONSTANT = (".bias", ".masked_bias", "position_ids", "inv_freq")  # masks are bytes, too


@dataclass(frozen=True)
class Source:
    """How a checkpoint is quantized. `block` is (rows, columns) of one FP8 scale where they are
    blocks; `bits`, `group` (-1: a row) and `zero_offset` are those of packed integers. `made_by`
    is who wrote it, where that is not the scheme's name.
    """

    scheme: str
    block: tuple[int, int] | None = None
    bits: int = 0
    group: int = 0
    zero_offset: int = 0
    made_by: str = ""

    @property
    def is_expanded(self) -> bool:
        return self.scheme != MXFP4

    def sentence(self, bases: Sequence[str]) -> str:
        """Return what plan, log and card say."""
        if not self.is_expanded:
            return (
                f"The source is stored in {self.scheme}: those tensors keep their type, the others"
                " are quantized."
            )
        better = f" {bases[0]} may have the full weights." if bases else ""
        carried = " Integers that a type of GGUF holds are carried over as they are."
        return (
            f"The source is quantized itself ({self.made_by or self.scheme}): it was expanded to 16"
            f" bits, but what it had lost stays lost."
            f"{carried if self.scheme in INTEGERS else ''}{better}"
        )


def check_equalizable(source: Source | None) -> None:
    """Raise UsageError for a source whose channels are not to be equalized: it is quantized, and
    its values would leave the grid that they lie on.
    """
    if source is not None:
        raise UsageError(
            "The source is quantized itself: with its channels equalized, its values would not lie"
            " on their grid any more.",
            "Run it without --equalize.",
        )


@dataclass(frozen=True)
class Expanded:
    """A tensor of the 16-bit checkpoint, and the stored tensors that it is made from."""

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # the first holds the weights


def quantization_of(config: Settings) -> Settings | None:
    """Return the quantization_config of a model or of its text model. Raises QuantkitError if it is
    not an object.
    """
    for part in config.parts:
        settings = part.get("quantization_config")
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise QuantkitError(
                "quantization_config in config.json is not a JSON object.",
                "If the weights are not quantized, remove it in a local copy.",
            )
        return Settings(settings)
    return None


def is_packed(tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether any weight is stored as a quantized model's are."""
    return any(
        name.rpartition(".")[2] in PACKED_PARTS
        or (tensor.dtype.startswith(_PACKED_TYPES) and not name.endswith(_CONSTANT))
        for name, tensor in tensors.items()
    )


def is_stale(config: Settings, tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether config.json speaks of quantized weights, and none are: a fine-tune was saved
    with the settings that its base was loaded with.
    """
    settings = quantization_of(config)
    if settings is None or is_packed(tensors):
        return False
    return settings.text("quant_method").lower() in _STORAGE


def without_quantization(config: Settings) -> Settings:
    """Return config.json without the settings that say that the weights are quantized."""
    own, text = (
        {key: value for key, value in part.items() if key != "quantization_config"}
        for part in config.parts
    )
    return Settings({**own, "text_config": text} if config.parts[1] else own)


STALE = (
    "config.json says that the weights are quantized ({method}), but none are: the setting is"
    " ignored."
)


class CannotExpand(QuantkitError):
    """The model is quantized in a way that cannot be undone here."""


def source_of(model: str, config: Settings, bases: Sequence[str]) -> Source | None:
    """Return how the model is quantized, None if it is not. Raises QuantkitError, with the
    alternative, for what cannot be expanded exactly as its own runtime would.
    """
    settings = quantization_of(config)
    if settings is None:
        return None
    method = shown(settings.text("quant_method", "unknown").lower())
    if method == "mxfp4":
        return Source(MXFP4)
    is_fp8 = (
        method in ("fp8", "fbgemm_fp8")
        or (method == "compressed-tensors" and settings.get("format") == "float-quantized")
        or (method == "modelopt" and settings.get("quant_algo") == "FP8")
    )
    if is_fp8:
        return Source(FP8, _block(model, settings.get("weight_block_size")))
    bits, group = settings.integer("bits"), settings.integer("group_size")
    if not (group == -1 or 0 < group < 2**20):
        bits = 0
    if method == "compressed-tensors":
        found = _compressed(settings)
        if found is not None:
            return found
    if method in ("auto-round", "intel/auto-round") and bits in (2, 3, 4, 8):
        found = _auto_round(settings, bits, group)
        if found is not None:
            return found
    if method == "gptq" and bits in (2, 3, 4, 8):
        offset = 0 if settings.get("checkpoint_format", "gptq") == "gptq_v2" else 1
        return Source(GPTQ, bits=bits, group=group, zero_offset=offset)
    version = settings.text("version", "gemm").lower()
    if method == "awq" and bits == 4 and version == "gemm":
        return Source(AWQ, bits=4, group=group)
    name = f"GPTQ at {shown(str(settings.get('bits')))} bits" if method == "gptq" else method
    raise CannotExpand(
        f"{model} is quantized already ({name}), in a way that cannot be undone here.",
        f"Give the original instead: {bases[0] if bases else 'the model it was made from'}.",
    )


def _compressed(settings: Settings) -> Source | None:
    """Integers of compressed-tensors: all linears alike, nothing rotated or sparse."""
    groups = settings.section("config_groups")
    parts = [groups.section(name) for name in groups]
    weights = [part.section("weights") for part in parts]
    formats = {part.text("format", settings.text("format")) for part in parts}
    kinds = {
        (w.integer("num_bits"), w.text("strategy"), w.integer("group_size"), w.text("type", "int"))
        for w in weights
    }
    sparse = settings.section("sparsity_config").text("format", "dense") != "dense"
    rotated = bool(settings.section("transform_config").get("config_groups"))
    if len(kinds) != 1 or not formats <= {"pack-quantized", "int-quantized"} or sparse or rotated:
        return None
    ((bits, strategy, group, kind),) = kinds
    if bits not in (2, 3, 4, 8) or kind != "int" or strategy not in ("group", "channel"):
        return None
    if strategy == "group" and not 0 < group < 2**20:
        return None
    return Source(PACKED, bits=bits, group=group if strategy == "group" else -1)


def _auto_round(settings: Settings, bits: int, group: int) -> Source | None:
    """AutoRound's own exports: GPTQ's layout with zeros as they are or one too low, or AWQ's."""
    form = settings.text("packing_format", settings.text("backend", "auto_round"))
    layers = settings.section("extra_config")
    mixed = any(layers.section(n).integer("bits") not in (0, bits, 16, 32) for n in layers)
    if mixed or settings.text("data_type", "int") != "int" or settings.get("rotation_config"):
        return None
    if form == "auto_round:auto_awq" and bits == 4:
        return Source(AWQ, bits=4, group=group, made_by="AutoRound")
    offsets = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0}
    if form not in offsets:
        return None
    return Source(GPTQ, bits=bits, group=group, zero_offset=offsets[form], made_by="AutoRound")


def _block(model: str, block: object) -> tuple[int, int] | None:
    if block is None:
        return None
    if isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) > 0:
        return block[0], block[1]
    raise CannotExpand(
        f"weight_block_size in the quantization_config of {model} is not a pair of sizes.",
        "Use another revision, or give the model it was made from.",
    )


def unpacked_shapes(
    config: Settings, shapes: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the types and shapes as transformers has them: MXFP4's blocks (experts, out, in / 32,
    16) and their scales are one tensor (experts, in, out).
    """
    if (quantization_of(config) or Settings()).text("quant_method").lower() != "mxfp4":
        return dict(shapes)
    made = {}
    for name, (dtype, shape) in shapes.items():
        stem = name.removesuffix("_blocks").removesuffix("_scales")
        if stem == name or f"{stem}_blocks" not in shapes or f"{stem}_scales" not in shapes:
            made[name] = (dtype, shape)
        elif name.endswith("_blocks") and len(shape) == 4:
            made[stem] = ("BF16", (shape[0], shape[2] * 2 * shape[3], shape[1]))
    return made


def expanded(source: Source, tensors: Mapping[str, StoredTensor]) -> dict[str, Expanded]:
    """Return the tensors of the 16-bit checkpoint. Raises QuantkitError where parts are missing."""
    made: dict[str, Expanded] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if source.scheme == FP8:
            of = tensors.get(name.removesuffix("_inv").removesuffix("_scale"))
            if last in _BESIDE or (of is not None and of != tensor and of.dtype.startswith("F8")):
                continue
            if tensor.dtype.startswith("F8"):
                scales = [n for n in (f"{name}_scale_inv", f"{name}_scale") if n in tensors]
                _check_scales(source, tensor, [tensors[n] for n in scales[:1]])
                made[name] = Expanded("BF16", tensor.shape, (name, *scales[:1]))
                continue
        elif source.scheme == PACKED and (last in _BESIDE_INTEGERS or tensor.dtype == "I8"):
            if last in ("weight_packed", "weight"):
                made[f"{stem}.weight"] = _compressed_weight(source, stem, tensors)
            continue
        elif last in _PACKED and f"{stem}.qweight" in tensors:
            if last == "qweight":
                made[f"{stem}.weight"] = _packed(source, stem, tensors)
            continue
        made[name] = Expanded(tensor.dtype, tensor.shape, (name,))
    return made


def _check_scales(source: Source, weight: StoredTensor, scales: Sequence[StoredTensor]) -> None:
    """Raise QuantkitError for FP8 scales that are not one, one a row, or one a block."""
    for scale in scales:
        shape = list(weight.shape)
        fitting = [[], [1], [1] * len(shape), shape[:1], [*shape[:-1], 1]]
        if source.block is not None and len(shape) >= 2:
            blocks = [-(-n // size) for n, size in zip(shape[-2:], source.block, strict=True)]
            fitting.append([*shape[:-2], *blocks])
        if list(scale.shape) not in fitting or scale.dtype not in ("F32", "BF16", "F16"):
            raise QuantkitError(
                f"The scales of {shown(weight.name)} do not fit its shape.",
                "The checkpoint is broken or of an unknown kind: give the original model.",
            )


def _packed(source: Source, stem: str, tensors: Mapping[str, StoredTensor]) -> Expanded:
    parts = [f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")]
    missing = [name for name in parts if name not in tensors]
    if missing:
        raise QuantkitError(
            f"The checkpoint has {parts[0]} but no {missing[0]}.", "Use another revision."
        )
    words, zeros, scales = (tensors[name] for name in parts)
    if f"{stem}.g_idx" in tensors:
        parts.append(f"{stem}.g_idx")
    if len(words.shape) == 2 and words.dtype == "I32" and scales.dtype in ("F16", "BF16", "F32"):
        rows, columns = words.shape
        is_gptq = source.scheme == GPTQ
        along = (rows if is_gptq else columns) * 32 // source.bits  # GPTQ's 3 bits cross words
        n_in, n_out = (along, columns) if is_gptq else (rows, along)
        n_groups = -(-n_in // source.group) if source.group > 0 else 1
        wanted = [(n_groups, n_out * source.bits // 32), (n_groups, n_out), (n_in,)]
        if [zeros.shape, scales.shape] == wanted[:2] and zeros.dtype == "I32":
            if len(parts) == 3 or tensors[parts[3]].shape == wanted[2]:
                return Expanded(scales.dtype, (n_out, n_in), tuple(parts))
    raise QuantkitError(
        f"{shown(stem)} is stored as {source.scheme} with shapes that do not fit the settings in"
        " config.json.",
        "Use another revision, or give the model it was made from.",
    )


def _compressed_weight(source: Source, stem: str, tensors: Mapping[str, StoredTensor]) -> Expanded:
    """A weight of compressed-tensors: integers of a byte, or packed along the columns."""
    name = f"{stem}.weight_packed" if f"{stem}.weight_packed" in tensors else f"{stem}.weight"
    beside = (f"{stem}.weight_{part}" for part in ("scale", "zero_point", "g_idx"))
    parts = (name, *(part for part in beside if part in tensors))
    weight, scale = tensors[name], tensors.get(f"{stem}.weight_scale")
    if scale is not None and len(weight.shape) == len(scale.shape) == 2:
        n_out, n_in = weight.shape
        n_groups = scale.shape[1]
        if weight.dtype == "I32" and 32 % source.bits == 0:
            n_in = n_in * 32 // source.bits
        elif weight.dtype == "I32":
            n_in = n_groups * source.group
        fits = n_groups == (-(-n_in // source.group) if source.group > 0 else 1)
        if fits and n_in > 0 and scale.shape[0] == n_out and weight.dtype in ("I32", "I8"):
            if scale.dtype in ("F16", "BF16", "F32"):
                return Expanded(scale.dtype, (n_out, n_in), parts)
    raise QuantkitError(
        f"{shown(stem)} is stored as {source.scheme} with shapes that do not fit the settings in"
        " config.json.",
        "Use another revision, or give the model it was made from.",
    )
