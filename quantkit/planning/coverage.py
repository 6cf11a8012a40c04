"""Predict from shapes alone, before any weight is there, how much of a model GPTQ will cover.

The converter's skeleton says which tensors the GGUF will have, transformers' model without data
which weights the forward pass multiplies with. A tensor is expected to be found where its block has
a weight that is as wide and has as many rows. The convert stage finds out for sure, row by row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.tensors import TensorSpec

_BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Coverage:
    """`share` of the parameters of linear layers will have a Hessian; what is left out, and why."""

    share: float
    apart: dict[str, str]  # kind of tensor -> why it has no Hessian


def in_words(coverage: Coverage) -> str:
    """Return a coverage as a sentence."""
    apart = "; ".join(f"not {kind}: {reason}" for kind, reason in coverage.apart.items())
    # Rounded down: all of it is only said where it is so.
    share = f"{int(1000 * coverage.share) / 10:g} % of the linear parameters"
    return f"{share} ({apart})" if apart else share


def foretell(widths: Sequence[Mapping[int, int]], specs: Mapping[str, TensorSpec]) -> Coverage:
    """Predict the coverage of the model whose GGUF will have the tensors `specs`. `widths` are
    those of transformers' blocks: columns -> rows of the largest weight (`quantkit.sources.fit`).
    """
    is_tied = "output.weight" not in specs
    n_all = n_covered = 0
    apart: dict[str, str] = {}
    for spec in specs.values():
        found = _BLOCK.match(spec.name)
        if not spec.quantizable:
            continue
        kind = spec.name.split(".")[-2]
        if kind == "token_embd" and not is_tied:
            continue  # GPTQ solves it by its gradients, but it is no linear layer
        if kind == "per_layer_token_embd":
            apart[kind] = "an embedding table is not a linear layer"
            continue
        n_all += spec.n_elements
        if found is None:
            n_covered += spec.n_elements
        elif int(found[1]) >= len(widths):
            apart[f"blk.{found[1]}"] = "a prediction head, which transformers does not load"
        elif widths[int(found[1])].get(spec.n_columns, 0) >= spec.n_rows:
            n_covered += spec.n_elements
        else:
            apart[kind] = "no weight of the model has this shape"
    return Coverage(n_covered / max(n_all, 1), apart)
