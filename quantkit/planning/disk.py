"""Compute what the folder of a run holds at the peak of every stage, from a model's shapes. A file
with two names counts once.

Files follow from shapes to the byte; what depends on text or on free memory is counted at its most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from quantkit.calibration.documents import LANGUAGE_TOKENS, PARTS
from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.quantized import source_of
from quantkit.config import DEMO_MODEL, N_CTX, PROFILES, SPLIT_BYTES, RunConfig
from quantkit.config.calibration import AUTO, parse_spec, parts_of
from quantkit.config.levels import around, wanted
from quantkit.config.targets import DEFAULT_TARGET
from quantkit.ggml.types import F16, QUANTIZED, QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.place import weights_room
from quantkit.planning.memory import Shapes, offloaded_bytes, tuned_tokens
from quantkit.run.artifacts import NAMES
from quantkit.search.optimizer import MOST_SEQUENCES
from quantkit.tuning.tuned import HELDOUT

_TABLES = 1_500_000  # report, plots, card, events and tables of a run
_IN_CONVERSATIONS, _IN_ONE = 12_000, 300  # scored tokens of all conversations, of a long one
_ROW_BYTES = 40  # of a scored token beside its distribution: evaluators/logit_store.py


@dataclass(frozen=True)
class Footprint:
    """Bytes of a run's files, but for levels and outputs, whose number and size are the user's.

    Those of a stage stay until the end, those for a while are gone when the stage is done.
    """

    downloaded: int  # into the Hub's cache, beside the folder
    fetched: int  # weights that fetch writes
    base: int
    equalized: int  # the checkpoint and the base once more, with channels equalized
    compared: int  # for a while: what convert compares base.gguf with its original by
    calibrated: int
    hidden_states: int  # for a while: those of quantize that do not fit in memory
    importances: int
    searched: int  # for a while: targets, and hidden states that do not fit in memory
    is_tuned: bool
    tuned_states: int  # for a while
    expanded: int  # for a while: a file at F16, which is in memory where that holds it
    predictions: int  # for a while: the base's, of what validate measures on
    split_bytes: int = SPLIT_BYTES  # larger files are published in parts: a second copy

    def measuring(self, stock: int) -> int:
        """Return the bytes that validate takes for a while, with the largest stock file."""
        return self.predictions + self.expanded + stock

    def by_stage(
        self, levels: int, measured: int, outputs: Sequence[int], stock: int
    ) -> dict[str, int]:
        """Return the bytes in the folder at the peak of every stage, for `levels` bytes of level
        files, of which `measured` stay when they are only measured, the bytes of each output and of
        the largest stock file that it is compared with.
        """
        kept, peaks = _TABLES, {}

        def stage(name: str, stays: int, for_a_while: int = 0) -> None:
            nonlocal kept
            kept += stays
            peaks[name] = kept + for_a_while

        stage("fetch", self.fetched)
        stage("convert", self.base + self.equalized, self.compared)
        stage("calibrate", self.calibrated)
        stage("quantize", levels + self.importances, self.hidden_states + self.importances)
        stage("search", 0, self.searched)
        stage("tune", sum(outputs) if self.is_tuned else 0, self.tuned_states)
        stage("stitch", 0 if self.is_tuned else sum(outputs))
        stage("validate", measured - levels, self.measuring(stock))
        stage("publish", sum(n for n in outputs if n > self.split_bytes))
        # A stage that is new passes what was there before it on.
        return {name: peaks.get(name, kept) for name in NAMES}


@dataclass(frozen=True)
class _Shapes:
    """What a footprint follows from."""

    base: int  # bytes of base.gguf
    expanded: int  # and of it at F16
    n_weights: int
    n_vocab: int
    width: int
    n_blocks: int
    n_context: int
    n_features: int  # outputs and inputs of all matrices


def footprint(
    config: RunConfig, info: ModelInfo, base: GgufFile, free: int, free_host: int
) -> Footprint:
    """Return the footprint from the header of base.gguf, on a device with `free` bytes of memory in
    a machine with `free_host`.
    """
    shapes, matrices = Shapes.of(base), [t for t in base.tensors.values() if len(t.shape) > 1]
    at_f16 = sum(F16.n_bytes(t.shape) - t.n_bytes for t in matrices)
    n_bytes = base.n_bytes
    known = _Shapes(
        base=n_bytes,
        expanded=n_bytes + at_f16,
        n_weights=base.n_elements,
        n_vocab=shapes.n_vocab,
        width=shapes.width,
        n_blocks=len(shapes.blocks),
        n_context=base.context_length,
        n_features=sum(prod(t.shape[:-1]) + prod((*t.shape[:-2], t.shape[-1])) for t in matrices),
    )
    return _footprint(config, info, known, free, free_host)


def guessed(config: RunConfig, info: ModelInfo, free: int, free_host: int) -> dict[str, int]:
    """Return about the bytes by stage before anything is downloaded, from config.json and the
    number of weights: levels and files as if every tensor had its level's bits.
    """

    def number(*names: str) -> int:
        found = (part.get(name) for part in info.config.parts for name in names)
        return next((n for n in found if isinstance(n, int) and n > 0), 1)

    n, width = info.n_parameters, number("hidden_size", "n_embd", "d_model")
    n_blocks = number("num_hidden_layers", "n_layer", "num_layers")
    known = _Shapes(
        base=F16.n_bytes((n,)),
        expanded=F16.n_bytes((n,)),
        n_weights=n,
        n_vocab=number("vocab_size"),
        width=width,
        n_blocks=n_blocks,
        n_context=number("max_position_embeddings", "n_positions"),
        n_features=16 * n_blocks * width,
    )
    pinned = [QuantType(q) for pattern, q in config.types if pattern == "default"]
    levels = pinned or [q for q in map(QuantType, config.level_names) if q.is_quantized]
    uniform = {q: int(q.bpw * n / 8) for q in levels}
    targets = config.targets or (() if pinned else (DEFAULT_TARGET,))
    largest = max(uniform.values())
    limits = [
        t.within(t.limit_bytes(n, lambda label: int(_bpw(label) * n / 8), lambda _: 0), largest)
        for t in targets
    ]
    limits = [min(limit, F16.n_bytes((n,))) for limit in limits] or [largest]
    found = _footprint(config, info, known, free, free_host)
    return by_stage(found, config, uniform, limits, [limit * 9 // 8 for limit in limits])


def by_stage(
    footprint: Footprint,
    config: RunConfig,
    uniform: Mapping[QuantType, int],
    limits: Sequence[int],
    stock: Iterable[int],
    keeps_levels: bool = False,
) -> dict[str, int]:
    """Return the bytes in the folder at the peak of every stage, for outputs of at most `limits`
    bytes, uniform files of the levels and stock files of these sizes. That is what is needed: where
    there is room validate keeps the levels that nothing reads any more (`keeps_levels`).
    """
    made = {level: uniform[level] for level in wanted(uniform, limits, config)}
    measured = around(made, limits, PROFILES[config.profile].effort.n_uniform)
    levels = sum(made.values())
    kept = levels if keeps_levels else sum(made[level] for level in measured)
    return footprint.by_stage(levels, kept, limits, largest_stock(stock, limits))


def largest_stock(stock: Iterable[int], limits: Sequence[int]) -> int:
    """Return about the bytes of the largest stock file that outputs of at most `limits` bytes are
    compared with: the next larger one.
    """
    stock = sorted(stock)
    larger = (next((n for n in stock if n > limit), max(limits)) for limit in limits)
    return max((*larger, *limits))


def _bpw(label: str) -> float:
    """About the bits for a weight of a stock mix: the most of a type with its number."""
    number = label.split("_")[0]
    return max((q.bpw for q in QUANTIZED if q.name.split("_")[0] == number), default=F16.bpw)


def _footprint(
    config: RunConfig, info: ModelInfo, shapes: _Shapes, free: int, free_host: int
) -> Footprint:
    # What the stages themselves go by; they need torch.
    from quantkit.model.blockwise import compute_dtype
    from quantkit.search.fitness import STATES_SHARE
    from quantkit.search.targets import target_bytes
    from quantkit.statistics.collect import ACTIVATIONS_SHARE
    from quantkit.statistics.turns import hessian_bytes
    from quantkit.tuning import tuner

    profile, width = PROFILES[config.profile], shapes.width
    n_tokens = profile.calibration_tokens + profile.heldout_tokens
    in_memory = F16.n_bytes((shapes.n_weights,)) <= weights_room(free_host)
    n_sequences = min(MOST_SEQUENCES, profile.heldout_tokens // N_CTX)
    itemsize = compute_dtype(config.device).itemsize

    def beyond(n_bytes: int, share: float, room: int) -> int:
        """Return what of hidden states does not fit beside the model."""
        taken = itemsize * shapes.n_weights
        return max(0, n_bytes - int(share * max(0, room - taken)))

    states = 4 * n_sequences * N_CTX * width * (shapes.n_blocks + 1)
    train = min(profile.calibration_tokens, tuned_tokens(config))
    streams = (4 * (train + HELDOUT * N_CTX) * width,) * 2 + (4 * HELDOUT * N_CTX * width,)
    source = source_of(info.id, info.config, info.base_model)
    is_written = (
        info.base is not None
        or (source is not None and source.is_expanded)
        or config.model == DEMO_MODEL
    )
    return Footprint(
        downloaded=0 if info.local_path else info.n_download_bytes,
        fetched=2 * shapes.n_weights if is_written else 0,
        base=shapes.base,
        equalized=2 * shapes.n_weights + shapes.base if config.equalize else 0,
        compared=shapes.expanded + offloaded_bytes(shapes.n_weights, free_host),
        calibrated=hessian_bytes(width) + 4 * shapes.n_features + 8 * (n_tokens + shapes.n_vocab),
        hidden_states=beyond(itemsize * n_tokens * width, ACTIVATIONS_SHARE, free_host),
        importances=4 * shapes.n_features,
        searched=target_bytes(n_sequences * N_CTX, shapes.n_vocab)
        + beyond(states, STATES_SHARE, free),
        is_tuned=config.tuning_steps > 0,
        tuned_states=sum(beyond(stream, tuner.STATES_SHARE, free) for stream in streams)
        if config.tuning_steps
        else 0,
        expanded=0 if in_memory else shapes.expanded,
        predictions=_predictions(config, shapes.n_vocab, shapes.n_context),
        split_bytes=config.split_bytes,
    )


def _predictions(config: RunConfig, n_vocab: int, n_context: int) -> int:
    """The base's log-probabilities of the second half of every window that is measured."""
    profile = PROFILES[config.profile]
    windows = [profile.eval_windows] if config.eval_text else _windows(config)
    n_scored = sum(windows) * N_CTX // 2
    n_scored += sum(
        n // 2 for n in profile.effort.long if n <= min(n_context, sum(windows) * N_CTX)
    )
    n_documents = profile.effort.documents
    n_scored += _IN_CONVERSATIONS if n_documents is None else 12 * n_documents * _IN_ONE
    return n_scored * (2 * n_vocab + _ROW_BYTES)


def _windows(config: RunConfig) -> list[int]:
    """At most how many windows of each calibration text are measured on."""
    profile, requests = PROFILES[config.profile], parse_spec(config.calibration)
    if requests[0].name == AUTO:
        requests = tuple(parts_of("hub"))
    n_tokens = profile.calibration_tokens + profile.heldout_tokens
    most, found = profile.eval_windows, []
    for request in requests:
        share = request.weight / sum(r.weight for r in requests)
        beside = most * N_CTX if request.language is None else min(most * N_CTX, LANGUAGE_TOKENS)
        held_out = PARTS["eval"] * (share * n_tokens / (1 - PARTS["eval"]) + beside)
        found.append(min(most, 2 + int(held_out) // N_CTX))  # the last document may be long
    return found
