"""Quantization types as GGUF stores them. Sizes are those of `gguf.GGML_QUANT_SIZES`; what
llama.cpp has and the gguf package not yet is in `_NEWER`.

A type is a `QuantType`, never a string or a number of bits: Q4_0 and Q4_K both cost 4.5 bits per
weight and are different things. A *stock mix* (`Q4_K_M`) is the recipe by which `llama-quantize`
chooses a type per tensor; it is a file type, not a tensor type, and only llama.cpp itself says what
it contains (`quantkit.llamacpp.stock`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering

import gguf

from quantkit.errors import UsageError

# Of ggml.h and llama.h of the llama.cpp that requirements.txt pins: number, weights and bytes of a
# block, and number of the file type.
_NEWER = {"Q2_0": (42, 64, 18, 41)}

_NUMBERS = {t.name: int(t) for t in gguf.GGMLQuantizationType}
_SIZES = {t.name: size for t, size in gguf.GGML_QUANT_SIZES.items()}
for _name, (_number, _size, _bytes, _) in _NEWER.items():
    _NUMBERS[_name], _SIZES[_name] = _number, (_size, _bytes)
_NAMES = {number: name for name, number in _NUMBERS.items()}


@total_ordering
@dataclass(frozen=True)
class QuantType:
    """One ggml tensor type. Ordered by bytes per weight, then by name."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in _SIZES:
            raise UsageError(f"There is no tensor type {self.name!r}.", _use_askable())

    @classmethod
    def from_json(cls, value: object) -> QuantType:
        """Return the type of this name. Raises UsageError for what is none."""
        return cls(str(value))

    @classmethod
    def of(cls, ggml: int) -> QuantType:
        """Return the type with ggml's number `ggml`. Raises ValueError for a number of none."""
        if int(ggml) not in _NAMES:
            raise ValueError(f"{ggml} is no type of ggml")
        return cls(_NAMES[int(ggml)])

    @property
    def ggml(self) -> int:
        """ggml's number of the type."""
        return _NUMBERS[self.name]

    @property
    def block_size(self) -> int:
        """Weights per block."""
        return _SIZES[self.name][0]

    @property
    def block_bytes(self) -> int:
        """Return the bytes per block."""
        return _SIZES[self.name][1]

    @property
    def bpw(self) -> float:
        """Bits per weight, for display only: sizes are computed with `row_bytes`."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    def fits(self, n_columns: int) -> bool:
        return n_columns % self.block_size == 0

    def row_bytes(self, n_columns: int) -> int:
        """Return the bytes of one row of `n_columns` weights. Raises ValueError where the row does
        not divide into blocks.
        """
        if not self.fits(n_columns):
            raise ValueError(
                f"{n_columns} columns do not divide into blocks of {self.block_size} ({self.name})"
            )
        return n_columns // self.block_size * self.block_bytes

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of `shape` (rows first, columns last)."""
        n_rows = 1
        for n in shape[:-1]:
            n_rows *= n
        return n_rows * self.row_bytes(shape[-1])

    def __lt__(self, other: QuantType) -> bool:
        return (self.block_bytes * other.block_size, self.name) < (
            other.block_bytes * self.block_size,
            other.name,
        )

    def __str__(self) -> str:
        return self.name


F32, F16, BF16 = QuantType("F32"), QuantType("F16"), QuantType("BF16")

# What can be asked for. Q8_1 and Q8_K are ggml's formats for activations; Q1_0 and NVFP4 have no
# importance-weighted quantizer worth offering yet.
_QUANTIZED = """
    IQ1_S IQ1_M TQ1_0 TQ2_0 IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS IQ4_NL
    Q2_K Q3_K Q4_K Q5_K Q6_K Q2_0 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4
"""
QUANTIZED = tuple(QuantType(name) for name in _QUANTIZED.split())
# Small, and slow to decode on a CPU: at 0.46 to 0.70 of Q4_K's speed (benchmarks/type_speed.py).
CODEBOOK_TYPES = tuple(q for q in QUANTIZED if q.name.startswith(("IQ1", "IQ2", "IQ3")))
KNOWN = tuple(map(QuantType, _SIZES))  # all that a file may hold

# What reads types that older builds of llama.cpp do not know.
READERS = {QuantType("Q2_0"): "llama.cpp of July 2026 or later (llama-cpp-python 0.3.36)"}


def askable(name: str) -> QuantType:
    """Return the type of this name, for tensors of a file. Raises UsageError for a name that is no
    type, and for ggml's types that store no weights.
    """
    qtype = QuantType(name)
    if qtype not in (*QUANTIZED, F16, BF16, F32):
        raise UsageError(f"Weights cannot be quantized to {name}.", _use_askable())
    return qtype


def _use_askable() -> str:
    known = ", ".join(q.name for q in sorted(QUANTIZED))
    return f"Use one of {known}, F16, BF16 or F32."


_FALLBACK = {
    "Q4_0": ("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"),
    "IQ4_NL": ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
    "Q5_0": ("Q4_K",),
    "Q5_1": ("Q5_K",),
    "Q8_0": ("Q6_K",),
}
_FALLBACK_OF = {
    QuantType(wide): QuantType(narrow) for narrow, wides in _FALLBACK.items() for wide in wides
}


def fallback(asked: QuantType, n_columns: int) -> QuantType:
    """Return the type that llama.cpp uses where rows of `n_columns` do not divide into `asked`'s
    blocks.

    Follows `tensor_type_fallback` of llama.cpp's src/llama-quant.cpp: a type of 32-blocks of about
    the same quality, and F16 where that does not fit either. A test holds it against llama.cpp's
    own dry run.
    """
    if asked.fits(n_columns):
        return asked
    narrow = _FALLBACK_OF.get(asked, asked)
    return narrow if narrow.fits(n_columns) else F16


# Labels of stock mixes ("Q4_K_M") and the number that `general.file_type` holds for each.
FILE_TYPES = {
    member.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(member)
    for member in gguf.LlamaFileType
    if member is not gguf.LlamaFileType.GUESSED
} | {name: file_type for name, (*_, file_type) in _NEWER.items()}
# The mixes that people download, smallest first; TQ and MXFP4_MOE are for models trained that way.
STOCK_MIXES = tuple(
    """
    IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M Q2_K_S Q2_K IQ3_XXS IQ3_XS IQ3_S IQ3_M Q3_K_S Q3_K_M
    Q3_K_L IQ4_XS IQ4_NL Q4_0 Q4_K_S Q4_1 Q4_K_M Q5_0 Q5_K_S Q5_1 Q5_K_M Q6_K Q8_0
    """.split()
)
# Types without a label of their own name: a file of them alone has that of a mix.
_OF_A_MIX = {
    **{f"Q{bits}_K": f"Q{bits}_K_M" for bits in (3, 4, 5)},
    "IQ2_S": "IQ2_M",  # the label IQ2_S is that of a mix around IQ2_XS
    "MXFP4": "MXFP4_MOE",
}


def file_label(qtype: QuantType) -> str:
    """Return llama.cpp's name for a file of one quantized type."""
    return _OF_A_MIX.get(qtype.name, qtype.name)
