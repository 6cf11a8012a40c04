"""Estimate the peak memory of every stage on a CPU from a model's shapes: resident bytes of the
process and its children, pages of mapped files included.

What each stage holds at once is counted; what libraries take was measured. Within 20 % on the
models of dev/LOG.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from quantkit.config import N_CTX, PROFILES, TUNING_BATCH, RunConfig
from quantkit.config.levels import LevelPlan
from quantkit.ggml.types import CODEBOOK_TYPES
from quantkit.gguf_file.read import GgufFile, StoredTensor
from quantkit.run.artifacts import NAMES
from quantkit.search.optimizer import MOST_SEQUENCES
from quantkit.tensors import is_in_block
from quantkit.tuning.tuned import HELDOUT

_PROGRAM = 300_000_000  # Python with numpy and gguf
_TORCH = 550_000_000  # and with torch and transformers
_SWEEP = 600_000_000  # bytes at work in one sweep over rows of all types
_AT_ONCE = 2  # tensors that are solved at a time
_TARGETS_ROWS = 512  # positions whose logits are there at once
PARITY_SHARE = 0.6  # of the free memory that convert's comparison may take for float32 weights
PARITY_LEFT = 4 * 2**30  # bytes for the libraries, activations and logits
_TUNED_WEIGHT = 40  # bytes for each weight of a block that is tuned


@dataclass(frozen=True)
class Shapes:
    """The shapes of a GGUF that the formulas need; its header is enough."""

    blocks: dict[str, list[StoredTensor]]
    outside: list[StoredTensor]

    @classmethod
    def of(cls, base: GgufFile) -> Shapes:
        blocks: dict[str, list[StoredTensor]] = {}
        outside = []
        for tensor in base.tensors.values():
            if is_in_block(tensor.name):
                blocks.setdefault(tensor.name.split(".")[1], []).append(tensor)
            else:
                outside.append(tensor)
        return cls(blocks, outside)

    @property
    def _table(self) -> StoredTensor:
        return next(t for t in self.outside if t.name == "token_embd.weight")

    @property
    def width(self) -> int:
        return self._table.shape[1]

    @property
    def n_vocab(self) -> int:
        return self._table.shape[0]

    @property
    def n_outside(self) -> int:
        return _count(self.outside)

    @property
    def n_block(self) -> int:
        return max(map(_count, self.blocks.values()), default=0)

    @property
    def n_all(self) -> int:
        return self.n_outside + sum(map(_count, self.blocks.values()))

    @property
    def largest(self) -> int:
        """Weights of the largest tensor."""
        return max(prod(t.shape) for t in self.outside)

    @property
    def n_inside(self) -> int:
        """Weights of the largest matrix of a block."""
        return max(
            (prod(t.shape[-2:]) for own in self.blocks.values() for t in own if len(t.shape) > 1),
            default=0,
        )

    @property
    def widest(self) -> int:
        """The most columns of a matrix of a block."""
        return max(
            (t.shape[-1] for own in self.blocks.values() for t in own if len(t.shape) > 1),
            default=0,
        )


def _count(tensors: Sequence[StoredTensor]) -> int:
    return sum(prod(t.shape) for t in tensors)


def stage_memory(
    config: RunConfig, base: GgufFile, levels: LevelPlan, most_hessians: int, free: int
) -> dict[str, int]:
    """Return the bytes by stage on a machine with `free` bytes of memory; `most_hessians` are those
    of the block that has most.
    """
    # Here and below, what the stages themselves go by; they need torch.
    from quantkit.model.streaming import WHOLE_SHARE
    from quantkit.search.fitness import STATES_SHARE
    from quantkit.statistics.collect import ACTIVATIONS_SHARE, BATCH_TOKENS, HESSIANS_SHARE
    from quantkit.statistics.turns import hessian_bytes

    shapes, profile = Shapes.of(base), PROFILES[config.profile]
    n_tokens = profile.calibration_tokens + profile.heldout_tokens

    def model(n_bytes: int, outside: int) -> int:
        """Return the bytes of the weights at `n_bytes` each: all of them, or those of one block and
        `outside` bytes for each weight outside of blocks.
        """
        if n_bytes * shapes.n_all <= WHOLE_SHARE * free:
            return n_bytes * (shapes.n_all - shapes.n_outside) + outside * shapes.n_outside
        return n_bytes * shapes.n_block + outside * shapes.n_outside

    logits = 4 * _TARGETS_ROWS * shapes.n_vocab
    activations = min(2 * n_tokens * shapes.width, int(ACTIVATIONS_SHARE * free))
    batch = min(n_tokens, BATCH_TOKENS) * (6 * shapes.widest + 16 * shapes.width)
    n_sequences = max(1, min(MOST_SEQUENCES, profile.heldout_tokens // N_CTX))
    states = 4 * N_CTX * n_sequences * shapes.width * (len(shapes.blocks) + 1)
    return dict.fromkeys(NAMES, _PROGRAM) | {
        "convert": max(2 * _PROGRAM + 8 * shapes.largest, _TORCH + model(2, 2)),
        "calibrate": _TORCH + model(2, 1) + 6 * logits,  # gradients
        "quantize": _TORCH
        + model(2, 0)
        + activations
        + max(
            max(hessian_bytes(shapes.widest), min(most_hessians, int(HESSIANS_SHARE * free)))
            + max(batch, _solving(shapes, levels)),
            _vocabulary(shapes, levels),
        ),
        "search": _TORCH
        + model(2, 4)
        + 4 * shapes.largest  # the table of embeddings or the head as it is exchanged
        + 4 * logits
        + min(states, int(STATES_SHARE * free)),
        "tune": _tuning(config, shapes, free),
        "stitch": _PROGRAM + 2 * shapes.largest,
        "validate": _TORCH + model(4, 4) + 2 * logits + min(2 * shapes.n_all, free),  # base.gguf
    }


def _solving(shapes: Shapes, levels: LevelPlan) -> int:
    """The tensors of a block: the widest Hessian being factorized, two tensors at work."""
    from quantkit.gptq.select import STACKED_WEIGHTS

    n_types = len(levels.levels)
    n_factors = 5 + any(level in CODEBOOK_TYPES for level in levels.levels)  # one by units
    sweep = _SWEEP * min(shapes.n_inside * n_types, STACKED_WEIGHTS) // STACKED_WEIGHTS
    return n_factors * 4 * shapes.widest**2 + _AT_ONCE * (4 * shapes.n_inside + sweep)


def parity_fits(n_weights: int, free: int) -> bool:
    """Return whether convert's comparison of base.gguf with its original has the weights in memory:
    whole, in float32.
    """
    return 4 * n_weights + PARITY_LEFT <= free and 4 * n_weights <= PARITY_SHARE * free


def offloaded_bytes(n_weights: int, free: int) -> int:
    """Return the bytes of weights that this comparison has on the disk otherwise."""
    if parity_fits(n_weights, free):
        return 0
    return max(0, 4 * n_weights - int(PARITY_SHARE * free / 2))


def tuning_bytes(config: RunConfig, base: GgufFile, free: int) -> int:
    """Return what tuning holds on its device, which has `free` bytes, the model included: without
    that nothing is tuned.
    """
    shapes = Shapes.of(base)
    beside = _tuned_block(config, shapes, free)
    model = _tuned_model(shapes, beside, free)
    tables = _tuned_tables(shapes)
    if config.device == "cpu":
        return model + beside + tables
    # What lies outside of blocks is on a GPU before the first block and after the last alone.
    logits = 4 * _TARGETS_ROWS * shapes.n_vocab
    return max(model + tables + 4 * logits, model - 4 * shapes.n_outside + beside)


def tuning_bytes_beside_model(config: RunConfig, base: GgufFile, free: int) -> int:
    """Return the bytes that tuning takes without the model."""
    return _tuned_block(config, Shapes.of(base), free)


def _tuning(config: RunConfig, shapes: Shapes, free: int) -> int:
    """What tuning holds, and the file's tensors and their pages."""
    if not config.tuning_steps:
        return _PROGRAM
    beside = _tuned_block(config, shapes, free)
    model = _tuned_model(shapes, beside, free)
    block = 4 * shapes.n_block if model < 4 * shapes.n_all else 0
    return _TORCH + model + block + beside + _tuned_tables(shapes) + shapes.n_all


def _tuned_model(shapes: Shapes, beside: int, free: int) -> int:
    """The original's weights: all of them where model.streaming has them whole, else those outside
    of blocks.
    """
    from quantkit.model.streaming import WHOLE_SHARE

    whole = 4 * shapes.n_all
    is_whole = whole <= WHOLE_SHARE * free and whole + beside <= free
    return whole if is_whole else 4 * shapes.n_outside


def _tuned_block(config: RunConfig, shapes: Shapes, free: int) -> int:
    """Bytes beside the original's weights and the tables: a block's weights, levels, gradients and
    Adam's moments; hidden states of the original and the tuned file.
    """
    from quantkit.tuning.tuner import STATES_SHARE

    streams = 2 * 4 * (tuned_tokens(config) + HELDOUT * N_CTX) * shapes.width
    batch = TUNING_BATCH * N_CTX * (32 * shapes.widest + 80 * shapes.width)
    states = min(streams, int(2 * STATES_SHARE * free))
    return _TUNED_WEIGHT * shapes.n_block + batch + states


def _tuned_tables(shapes: Shapes) -> int:
    """The table of embeddings and the head as the file has them."""
    return 2 * 4 * shapes.largest


def tuned_tokens(config: RunConfig) -> int:
    """Return how many tokens blocks are tuned on."""
    from quantkit.tuning.tuner import ROUNDS

    seen = config.tuning_steps * TUNING_BATCH * N_CTX // ROUNDS
    return min(PROFILES[config.profile].calibration_tokens, seen)


def _vocabulary(shapes: Shapes, levels: LevelPlan) -> int:
    """The table of embeddings or the head: its values, and the rows of every method and type."""
    from quantkit.gptq.units import ALL_TYPES_AT_ONCE

    n_at_once = 1 if shapes.largest > ALL_TYPES_AT_ONCE else len(levels.levels)
    packed = shapes.largest * 3 // 4
    return 4 * shapes.largest + (3 * n_at_once + len(levels.levels)) * packed + _SWEEP
