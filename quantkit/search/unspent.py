"""Tell where a budget cannot be spent: what a file leaves of it, and the sizes that leave nothing.

A model whose table of embeddings is most of it goes up by tens of MB at once. Where everything else
has the largest type already, what lies between two types of the table buys nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.search.allocation import Choices, SearchSpace
from quantkit.sizes import size, size_for

_WORTH_SAYING = 0.01  # of a budget


@dataclass(frozen=True)
class Unspent:
    """A budget and the bytes of the best file within it. Of all tensors, `tensor` takes the fewest
    bytes more to have a larger type, `step_bytes`: more than are left. Without one, every tensor
    has its largest type.
    """

    limit_bytes: int
    n_bytes: int
    tensor: str = ""
    step_bytes: int = 0

    @property
    def unused_bytes(self) -> int:
        """Return what the file leaves of its budget."""
        return self.limit_bytes - self.n_bytes

    @property
    def worth_asking(self) -> tuple[int, ...]:
        """Return the sizes nearest to the budget that can be spent: the file's own, and that at
        which the tensor goes up.
        """
        larger = (self.n_bytes + self.step_bytes,) if self.tensor else ()
        return (self.n_bytes, *larger)

    def sentence(self, is_expected: bool = False) -> str:
        """Say the same, and which sizes to ask for; `is_expected`: of a file that is not made."""
        stay = "would stay" if is_expected else "stay"
        said = f"{size(self.unused_bytes)} of {size(self.limit_bytes)} {stay} unused:"
        same, *larger = map(size_for, self.worth_asking)
        if not larger:
            return f"{said} every tensor has its largest type. Ask for {same} to get the same file."
        return (
            f"{said} the next larger type of {self.tensor} takes {size(self.step_bytes)} more."
            f" Sizes worth asking for: {same} (the same file) or {larger[0]}."
        )


def worth_saying(limit_bytes: int) -> float:
    """Return the least bytes of a budget that are worth a sentence."""
    return _WORTH_SAYING * limit_bytes


def unspent(space: SearchSpace, choices: Choices) -> Unspent | None:
    """Return what these choices leave of the budget; None where that is little, or where a tensor
    could have a larger type within it.
    """
    n_bytes, limit = space.n_bytes(choices), space.limit_bytes
    if limit - n_bytes < worth_saying(limit):
        return None
    steps = [
        (step, space.tensors[tensor])
        for tensor, choice in enumerate(choices.tolist())
        for larger in range(choice + 1, len(space.candidates[tensor]))
        if (step := space.step_bytes(tensor, choice, larger)) > 0
    ]
    if not steps:
        return Unspent(limit, n_bytes)
    step, tensor = min(steps)
    return Unspent(limit, n_bytes, tensor, step) if step > limit - n_bytes else None
