"""The cost of an error in a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sensitivity:
    """The cost of an error in a tensor, on the device where rows are solved (see
    `quantkit.statistics.fisher`).

    `outputs` (n_rows,) are the mean squared gradients at the layer's outputs, None for a table that
    is only looked up. A table of embeddings has `frequency` (n_rows,) and `lookups` (n_columns,
    n_columns), the mean outer products of the gradients at what is looked up.
    """

    outputs: torch.Tensor | None
    frequency: torch.Tensor | None = None
    lookups: torch.Tensor | None = None

    def rows(self, first: int, last: int) -> Sensitivity:
        """Return the sensitivity of some rows of the tensor."""
        outputs = None if self.outputs is None else self.outputs[first:last]
        frequency = None if self.frequency is None else self.frequency[first:last]
        return Sensitivity(outputs, frequency, self.lookups)
