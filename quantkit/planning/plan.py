"""Plan a run before it starts: sizes, levels, fallbacks, memory, disk and time.

Nothing is guessed that can be asked. The real converter makes the skeleton of `base.gguf` from
config, tokenizer and the headers of the weights; llama.cpp's own dry run tells from it what every
stock mix and level would weigh. So an architecture or tokenizer that is not supported, a pattern
that names nothing and a budget that cannot be met are refused before any weight is downloaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.quantized import check_equalizable, source_of
from quantkit.config import PROFILES, RunConfig
from quantkit.config.budgets import Budget, settle_budgets
from quantkit.config.levels import LevelPlan, plan_levels, wanted
from quantkit.ggml.types import STOCK_MIXES, QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.gguf_file.write import data_bytes
from quantkit.llamacpp.contexts import ContextMemory, context_memory
from quantkit.llamacpp.converter.architectures import check_architecture
from quantkit.llamacpp.converter.convert import convert
from quantkit.llamacpp.stock import StockRecipe, quantizable_tensors, stock_bytes
from quantkit.planning import texts
from quantkit.planning.cost import estimates, free_bytes, times
from quantkit.planning.coverage import foretell
from quantkit.planning.disk import by_stage, footprint
from quantkit.planning.nouns import Plan, PlannedModel, Sizes, Times
from quantkit.planning.spending import foretold, kinds_of
from quantkit.planning.time import stage_times
from quantkit.sources.fit import copies, kept_notes
from quantkit.sources.resolve import read_headers, resolve
from quantkit.tensors import TensorSpec

_HEADER_MARGIN = 4096  # bytes of provenance metadata that the output may add to the base's header


def specs_of(base: GgufFile) -> dict[str, TensorSpec]:
    """Return the tensors of a GGUF (its header is enough) by name, in file order. What the source
    has quantized already, as MXFP4, stays as it is.

    Raises QuantkitError for what llama.cpp must not be asked about: the converter wrote the file
    where a stranger's bytes are read.
    """
    check_sound(base)
    quantizable = {
        name for name in quantizable_tensors(base.path) if not base.tensors[name].qtype.is_quantized
    }
    return {
        t.name: TensorSpec(t.name, t.shape, t.qtype, t.name in quantizable)
        for t in base.tensors.values()
    }


def uniform_bytes(base: GgufFile, levels: LevelPlan) -> dict[QuantType, int]:
    """Return about the bytes of the uniform file of every level."""
    header = min(t.offset for t in base.tensors.values()) + _HEADER_MARGIN
    return {level: header + data_bytes(base, levels.uniform(level)) for level in levels.levels}


def check_sizes(config: RunConfig, base: GgufFile, levels: LevelPlan) -> Sizes:
    """Return the possible sizes. Raises QuantkitError when the budget is outside of them."""
    least_header = min(t.offset for t in base.tensors.values())
    header = least_header + _HEADER_MARGIN
    uniform = {str(level): n_bytes for level, n_bytes in uniform_bytes(base, levels).items()}
    smallest = header + data_bytes(base, levels.smallest)
    # The margin may stay unused: a budget that is named as possible must be so without it.
    largest = least_header + data_bytes(base, levels.largest)
    largest_made = least_header + data_bytes(base, levels.largest_made)
    budgets, refused = budgets_of(config, base, smallest, largest, largest_made)
    return Sizes(budgets, refused, smallest, largest, largest_made, uniform)


@dataclass(frozen=True)
class Made:
    """The possible sizes, the levels that a run makes, and those that no file of the sizes asked
    for can want.
    """

    sizes: Sizes
    levels: LevelPlan
    left_out: tuple[str, ...]


def made_levels(config: RunConfig, base: GgufFile, specs: Mapping[str, TensorSpec]) -> Made:
    """Decide which levels a run makes. Raises what `plan_levels` and `check_sizes` raise."""
    sizes = check_sizes(config, base, plan_levels(specs, config))
    made = wanted(sizes.uniform, sizes.limits, config)
    left_out = tuple(str(level) for level in sizes.uniform if level not in made)
    return Made(sizes, plan_levels(specs, config, made), left_out)


def budgets_of(
    config: RunConfig, base: GgufFile, smallest: int, largest: int, largest_made: int
) -> tuple[tuple[Budget, ...], tuple[Budget, ...]]:
    """Do `settle_budgets` for the model of a GGUF, whose header is enough."""

    def mix_bytes(label: str) -> int:
        return stock_bytes(base, StockRecipe(label))

    @cache  # llama.cpp is only asked where a size depends on it, and once for all of them
    def memory() -> ContextMemory:
        return context_memory(base)

    def context_bytes(n_tokens: int) -> int:
        return memory().n_bytes(n_tokens)

    n = base.n_elements
    return settle_budgets(config, n, mix_bytes, context_bytes, smallest, largest, largest_made)


def make_plan(
    config: RunConfig,
    progress: Callable[[int, int], None] | None = None,
    looked: Callable[[ModelInfo], None] | None = None,
) -> Plan:
    """Plan a run. Downloads a few MB at most. `looked` is called with the first facts, long before
    the rest is known.

    Raises QuantkitError for everything that can be refused now.
    """
    said = texts.look(config)
    token = hub.resolve_token()
    with tempfile.TemporaryDirectory(prefix="quantkit-plan-") as folder:
        info = resolve(config.model, config.revision, token, Path(folder))
        if looked is not None:
            looked(info)
        check_architecture(info.config)
        snapshot, fit = read_headers(info, token, Path(folder))
        copied = copies(fit.tied, info.base or info, token)
        source = source_of(info.id, info.config, info.base_model)
        if config.equalize:
            check_equalizable(source)
        warnings = [*said, *info.notes, *fit.notes, *kept_notes(fit.tied, copied)]
        warnings += [] if source is None else [source.sentence(info.base_model)]
        skeleton = Path(folder) / "base.gguf"
        conversion = convert(
            snapshot,
            skeleton,
            skeleton=True,
            model_name=info.id,
            left_out=[*fit.unread, *copied],
            progress=progress,
        )
        base = GgufFile(skeleton)
        specs = specs_of(base)
        made = made_levels(config, base, specs)
        sizes = made.sizes
        coverage = foretell(fit.widths, specs)
        stock = {label: stock_bytes(base, StockRecipe(label)) for label in STOCK_MIXES}
        context = context_memory(base)
        warnings += [context.note] if context.note else []
        found = footprint(config, info, base, free_bytes(config.device), free_bytes("cpu"))
        disk = by_stage(found, config, sizes.uniform, sizes.limits, stock.values())
        one_file = estimates(config, base, made.levels, found, disk)
        levels, n_files = tuple(map(str, made.levels.levels)), max(1, len(sizes.budgets))
        alike = kinds_of(base, plan_levels(specs, config))
        limits = [budget.limit_bytes for budget in sizes.budgets]
        return Plan(
            model=PlannedModel(
                id=info.id,
                sha=info.sha,
                architecture=info.architectures[0],
                n_parameters=base.n_elements,
                license=info.license,
                gated=info.gated,
                download_bytes=info.n_download_bytes,
            ),
            sizes=sizes,
            stock=stock,
            context=context,
            levels=levels,
            left_out=made.left_out,
            footprint=found,
            coverage=coverage,
            fallbacks=made.levels.fallbacks,
            sandbox=conversion.sandbox,
            warnings=(*warnings, *conversion.warnings, *conversion.tokens.notes),
            estimates=one_file.for_files(n_files),
            profiles={
                name: of_one.for_files(n_files)
                for name, of_one in _by_profile(config, base, specs, sizes.limits, found.base)
            },
            alike=alike,
            unspent=foretold(alike, sizes.smallest_bytes, levels, limits, config.max_types),
        )


def _by_profile(
    config: RunConfig,
    base: GgufFile,
    specs: Mapping[str, TensorSpec],
    limits: Iterable[int],
    base_bytes: int,
) -> Iterator[tuple[str, Times]]:
    """The time that a file takes with each profile: of its own levels and its own work."""
    for name in PROFILES:
        other = replace(config, profile=name)
        uniform = uniform_bytes(base, plan_levels(specs, other))
        levels = plan_levels(specs, other, wanted(uniform, limits, other))
        yield name, times(other.device, stage_times(other, base, levels, base_bytes))
