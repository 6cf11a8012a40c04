"""Decide which types each tensor can have, and where a tensor needs a fallback.

A *level* is a type that was asked for, such as Q4_K. What a tensor gets for it depends on its
width: rows that do not divide into 256-blocks fall back to a type of 32-blocks, exactly as in
llama.cpp. Beside its levels a tensor may stay in the 16 bits that base.gguf has it in, which no
file has to be made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from quantkit.config import RunConfig, compile_pattern
from quantkit.errors import UsageError
from quantkit.ggml.types import BF16, CODEBOOK_TYPES, F16, QuantType, fallback
from quantkit.tensors import Fallback, TensorSpec

T = TypeVar("T")

# A level is made where its uniform file has at least and at most so many times the bytes asked for.
# Without the others the search loses less than 1 %; a few tensors want far more bits than the rest.
_LEAST, _MOST = 0.6, 1.9
_LEAST_OF_CODEBOOKS = 0.8  # scalar types of the same bits are there, and faster
# Of two types whose errors are alike nobody wants the larger (dev/LOG.md, "Which levels a size
# wants"), where most rows divide into the smaller one's blocks.
_NO_BETTER_THAN = {QuantType("Q4_1"): QuantType("Q4_K")}
_SAME_SIZE = 0.95  # more of the larger one's bytes are rows that fell back to it
LEFT_OUT = "no file of the sizes asked for would want them; they are made when they are named"


@dataclass(frozen=True)
class LevelPlan:
    """The asked levels, and for every tensor that is quantized the type it gets at each of them."""

    levels: tuple[QuantType, ...]
    types: dict[str, dict[QuantType, QuantType]]  # tensor -> asked level -> type
    fallbacks: tuple[Fallback, ...]
    kept: dict[str, QuantType] = field(default_factory=dict)  # what may stay as base.gguf has it

    def choices(self, tensor: str) -> tuple[QuantType, ...]:
        """Return the distinct types that a tensor is made in, smallest first."""
        return tuple(sorted(set(self.types[tensor].values())))

    @property
    def smallest(self) -> dict[str, QuantType]:
        """Return the types of the smallest file, for the tensors that are quantized."""
        return {tensor: self.choices(tensor)[0] for tensor in self.types}

    @property
    def largest_made(self) -> dict[str, QuantType]:
        """Return the types of the largest file without what stays as base.gguf has it."""
        return {tensor: self.choices(tensor)[-1] for tensor in self.types}

    @property
    def largest(self) -> dict[str, QuantType]:
        """Return the types of the largest file."""
        made = self.largest_made
        return {tensor: max(q, self.kept.get(tensor, q)) for tensor, q in made.items()}

    def uniform(self, level: QuantType) -> dict[str, QuantType]:
        """Return the types of the uniform file of one level, for the tensors that are quantized."""
        return {tensor: types[level] for tensor, types in self.types.items()}


def wanted(
    uniform: Mapping[QuantType, int], limits: Iterable[int], config: RunConfig
) -> tuple[QuantType, ...]:
    """Return the levels that a file of one of these sizes can want, of those whose uniform files
    have the bytes `uniform`: all that lie around a size, and the next smaller and larger ones, so
    that every size can be made. Levels that were asked for by name are all wanted.
    """
    limits = tuple(limits)
    if config.levels is not None or not limits:
        return tuple(uniform)
    uniform = {q: n for q, n in uniform.items() if not _is_no_better(q, uniform)}
    kept: set[QuantType] = set()
    for limit in limits:
        below = [level for level, n_bytes in uniform.items() if n_bytes <= limit]
        above = [level for level, n_bytes in uniform.items() if n_bytes >= limit]
        kept |= {level for level in below if uniform[level] >= _least(level) * limit}
        kept |= {level for level in above if uniform[level] <= _MOST * limit}
        kept |= {max(below, key=lambda q: uniform[q])} if below else set()
        kept |= {min(above, key=lambda q: uniform[q])} if above else set()
    return tuple(level for level in uniform if level in kept)


def _is_no_better(level: QuantType, uniform: Mapping[QuantType, int]) -> bool:
    smaller = uniform.get(_NO_BETTER_THAN.get(level, level), uniform[level])
    return smaller < _SAME_SIZE * uniform[level]


def _least(level: QuantType) -> float:
    return _LEAST_OF_CODEBOOKS if level in CODEBOOK_TYPES else _LEAST


def around(n_bytes: Mapping[T, int], sizes: Iterable[int], n_around: int) -> list[T]:
    """Return what is nearest in bytes to some sizes: for every size the largest of at most that,
    then the next larger one, `n_around` in all, each once.
    """
    by_size = sorted(n_bytes, key=lambda x: n_bytes[x])
    found: dict[T, None] = {}
    for size in sizes:
        below = [x for x in by_size if n_bytes[x] <= size][-1:]
        above = [x for x in by_size if n_bytes[x] > size][:1]
        found |= dict.fromkeys([*below, *above][:n_around])
    return list(found)


def plan_levels(
    specs: Mapping[str, TensorSpec],
    config: RunConfig,
    levels: Sequence[QuantType] | None = None,
) -> LevelPlan:
    """Decide the types of every quantizable tensor from the config's pins, tensor pattern and
    levels, or of the latter from those that are wanted of them. Tensors may stay in 16 bits unless
    levels were given by name without F16 or BF16; both mean the 16 bits of base.gguf.

    Raises UsageError when a pattern of `types` or `tensors` names no tensor, or when there is none
    to quantize.
    """
    default = dict(config.types).get("default")
    named = tuple(QuantType(name) for name in ((default,) if default else config.level_names))
    whole = () if default else tuple(q for q in named if not q.is_quantized)
    asked = tuple(q for q in named if q not in whole)
    levels = asked if levels is None else tuple(levels)
    may_stay = not default and (config.levels is None or bool(whole))
    kept: dict[str, QuantType] = {}
    chosen = [spec for spec in specs.values() if spec.quantizable and _is_chosen(spec.name, config)]
    _check_patterns(
        config, [spec.name for spec in specs.values() if spec.quantizable], bool(chosen)
    )
    types: dict[str, dict[QuantType, QuantType]] = {}
    fallbacks: dict[tuple[str, str], Fallback] = {}
    for spec in chosen:
        pinned, least = config.pinned_type(spec.name), config.least_type(spec.name)
        types[spec.name] = {}
        carried = {} if pinned else _carried(spec, levels, least)
        for level in levels:
            if level in carried:
                types[spec.name][level] = carried[level]
                continue
            given = pinned or max(level, least or level)
            used = types[spec.name][level] = fallback(given, spec.n_columns)
            if used != given:
                fallbacks[spec.name, given.name] = Fallback(
                    spec.name,
                    given.name,
                    used.name,
                    f"rows of {spec.n_columns} do not divide into blocks of {given.block_size}",
                )
        own = spec.qtype
        if may_stay and not pinned and (own in (F16, BF16) or whole):
            kept[spec.name] = own
            if whole and own not in whole:
                fallbacks[spec.name, whole[0].name] = Fallback(
                    spec.name, whole[0].name, own.name, "the original has it so"
                )
    return LevelPlan(levels, types, tuple(fallbacks.values()), kept)


def _carried(
    spec: TensorSpec, levels: Sequence[QuantType], least: QuantType | None
) -> dict[QuantType, QuantType]:
    """The types that hold what a quantized source has, each instead of the next larger level: no
    other type of the level is as close. The largest level stays, or sizes would be out of reach.
    """
    found: dict[QuantType, QuantType] = {}
    for qtype in spec.carried:
        above = [level for level in levels if level >= qtype]
        if above and (least is None or qtype >= least):
            level = min(above)
            if level != max(levels) or level.bpw == qtype.bpw:
                found.setdefault(level, qtype)
    return found


def _is_chosen(tensor: str, config: RunConfig) -> bool:
    return config.tensors is None or compile_pattern(config.tensors).search(tensor) is not None


def _check_patterns(config: RunConfig, tensors: Sequence[str], any_chosen: bool) -> None:
    if not tensors:
        raise UsageError(
            "The model has no tensor that llama.cpp would quantize.",
            "Its rows do not divide into blocks of 32: use its full-precision GGUF as it is.",
        )
    if not any_chosen:
        raise UsageError(
            f"No quantizable tensor matches {config.tensors!r}.",
            "Name some of it, such as ffn_down (`quantkit plan` lists them).",
        )
    for pattern, _ in config.types:
        if pattern != "default" and not any(
            compile_pattern(pattern).search(name) for name in tensors
        ):
            raise UsageError(
                f"No quantizable tensor matches the pinned {pattern!r}.",
                "Name some of it, such as ffn_down (`quantkit plan` lists them).",
            )
