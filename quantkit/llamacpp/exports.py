"""An allocation in the formats of other programs.

tensor_types   for `llama-quantize --tensor-type-file`: a regex and a type a line
toolkit        for the EvoPress GGUF toolkit's stitcher: `name: bits (bits-TYPE.pth)`
"""

from __future__ import annotations

import re
from typing import Any

from quantkit.ggml.types import QuantType

_TOOLKIT_BITS = {"Q2_K": 2.5625}  # what the toolkit names its files after; the type has 2.625


def tensor_types(recipe: dict[str, Any]) -> str:
    """The types of a recipe's tensors as llama-quantize reads them. It quantizes by rounding: the
    types are the same, the weights are not.
    """
    return "".join(
        f"^{re.escape(name)}$={row['qtype'].lower()}\n" for name, row in recipe["tensors"].items()
    )


def toolkit(recipe: dict[str, Any]) -> str:
    """The types of a recipe's tensors as the toolkit's configuration."""
    lines = []
    for name, row in recipe["tensors"].items():
        qtype = QuantType(row["qtype"])
        bits = f"{_TOOLKIT_BITS.get(qtype.name, qtype.bpw):g}"
        lines.append(f"{name}: {bits} ({bits}-{qtype.name}.pth)\n")
    return "".join(lines)
