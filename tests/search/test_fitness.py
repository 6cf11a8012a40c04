"""Fitness on a tiny Llama: against a KL divergence computed outright, whatever is cached."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.ggml import decode, native
from quantkit.ggml.formats import FORMATS
from quantkit.ggml.types import QuantType
from quantkit.model import precision
from quantkit.model.blockwise import BlockwiseModel, load_model
from quantkit.model.row_maps import RowMap
from quantkit.model.streaming import open_model
from quantkit.sandbox.untrusted import build
from quantkit.search.allocation import SearchSpace
from quantkit.search.evopress import Schedule, SearchState, begin, evolve
from quantkit.search.fitness import CHUNKS, Fitness
from quantkit.search.propose import uniform
from quantkit.search.targets import Targets, target_bytes
from quantkit.tensors import Candidate, to_json

TYPES = tuple(map(QuantType, ("Q4_0", "Q5_0", "Q8_0")))
N_CTX, N_SEQUENCES, N_VOCAB = 24, 8, 96


class World:
    """A model, level files with every matrix in three types, row maps, tokens."""

    def __init__(self, folder: Path, tied: bool) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=N_VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        self.folder = folder
        self.model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for weight in self.model.parameters():
            if weight.dim() == 2:
                weight.normal_().div_(weight.shape[1] ** 0.5)
        self.model.get_input_embeddings().weight.mul_(3 / 8 if tied else 1)
        if not tied:
            self.model.lm_head.weight.mul_(3)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, N_VOCAB, (N_SEQUENCES, N_CTX), generator=generator).numpy()
        self.maps: dict[str, RowMap] = {}
        self.values: list[list[torch.Tensor]] = []
        blobs: dict[QuantType, bytes] = {q: b"x" * 7 for q in TYPES}  # offsets need no alignment
        candidates = []
        for name, weight in self.model.named_parameters():
            if weight.dim() != 2:
                continue
            order = torch.randperm(len(weight), generator=generator)
            rows = None if len(self.maps) % 2 else order  # every other tensor is permuted
            stored = weight if rows is None else weight[rows]
            self.maps[name] = RowMap(
                name, name, False, rows, name.removesuffix(".weight"), "embed" in name
            )
            own, values = [], []
            for q in TYPES:
                packed = native.quantize(stored.numpy(), q)
                place = f"{q}.bin", len(blobs[q]), packed.nbytes
                own.append(Candidate(name, q, "rtn", *place, 1.0, None))
                blobs[q] += packed.tobytes()
                dequantized = torch.from_numpy(native.dequantize(packed, q))
                back = torch.empty_like(dequantized)
                back[slice(None) if rows is None else rows] = dequantized
                values.append(back)
            candidates.append(tuple(own))
            self.values.append(values)
        self.levels = {f"{q}.bin": folder / f"{q}.bin" for q in TYPES}
        for q, blob in blobs.items():
            self.levels[f"{q}.bin"].write_bytes(blob)
        sizes = tuple(tuple(c.n_bytes for c in row) for row in candidates)
        largest = sum(row[-1] for row in sizes)
        smallest = sum(row[0] for row in sizes)
        self.space = SearchSpace(
            tuple(self.maps), tuple(candidates), sizes, 0, (largest + smallest) // 2
        )
        self.names = list(self.maps)

    def fitness(
        self, name: str = "targets", dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Fitness:
        """A fresh evaluator on a fresh copy of the model."""
        return Fitness(
            BlockwiseModel(copy.deepcopy(self.model).to(device, dtype)),
            self.space,
            self.maps,
            self.levels,
            self.ids,
            self.folder / f"{name}.partial",
        )

    def true_kl(
        self, choices: np.ndarray, other: Mapping[str, torch.Tensor] | None = None
    ) -> np.ndarray:
        """Mean KL of every sequence, float64, from the model's own forward; with `other` values of
        some tensors.
        """
        changed = copy.deepcopy(self.model)
        parameters = dict(changed.named_parameters())
        for name, values, k in zip(self.names, self.values, choices.tolist(), strict=True):
            parameters[name].copy_((other or {}).get(name, values[k]))
        ids = torch.from_numpy(self.ids)
        with torch.no_grad():
            p, q = (torch.log_softmax(m(ids).logits.double(), -1) for m in (self.model, changed))
        return (p.exp() * (p - q)).sum(-1).mean(1).numpy()

    def change(self, choices: np.ndarray, *parts: str) -> np.ndarray:
        """`choices` with the next type for the tensors whose name holds one of `parts`."""
        other = choices.copy()
        for i, name in enumerate(self.names):
            if any(part in name for part in parts):
                other[i] = (other[i] + 1) % len(TYPES)
        return other


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("levels"), request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("levels"), False)


def middle(world: World) -> np.ndarray:
    return np.ones(len(world.names), np.int64)


def test_it_is_the_kl_of_the_bytes_in_the_files(world: World) -> None:
    """Every sequence; targets in 16 bits and logits in float32 cost a thousandth, or 3e-7."""
    fitness = world.fitness()
    for choices in (world.space.smallest, middle(world), world.space.largest):
        np.testing.assert_allclose(
            fitness.kl(choices, 0, N_SEQUENCES).mean(1),
            world.true_kl(choices),
            rtol=2e-3,
            atol=3e-7,
        )


def test_the_base_itself_has_none(world: World) -> None:
    """Before anything is loaded the model is the base: its KL is that of float16's rounding."""
    fitness = world.fitness()
    (done,) = fitness._run([fitness._begin(None, 0, 2)])
    assert float(np.abs(fitness._score(done)).max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_model_scores_the_same(
    world: World, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks from the file, the parent's states in a file of their own: the same bits."""
    copy.deepcopy(world.model).save_pretrained(tmp_path)
    judges = []
    for name, memory in (("whole", "1TB"), ("streamed", "10kB")):
        monkeypatch.setenv("QUANTKIT_MEMORY", memory)
        model = open_model(tmp_path, dtype)
        assert model.is_streamed == (name == "streamed")
        targets = world.folder / f"{name}.partial"
        judges.append(Fitness(model, world.space, world.maps, world.levels, world.ids, targets))
    whole, streamed = judges
    parent = middle(world)
    asked = [parent, *(world.change(parent, part) for part in PARTS), world.space.largest]
    for judge in (whole, streamed):
        judge.set_parent(parent)
    for first, last in ((0, 4), (4, N_SEQUENCES), (0, N_SEQUENCES)):
        for choices in asked:
            assert np.array_equal(whole.kl(choices, first, last), streamed.kl(choices, first, last))
    assert (world.folder / "states-streamed.partial").exists()
    assert all(p.is_meta for block in model.blocks for p in block.parameters())


def test_a_block_is_read_once_for_all_sequences(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches, one pass over the file; candidates begin at the first block that changed."""
    copy.deepcopy(world.model).save_pretrained(tmp_path)
    monkeypatch.setenv("QUANTKIT_MEMORY", "250kB")
    model = open_model(tmp_path)
    targets = world.folder / "once.partial"
    fitness = Fitness(model, world.space, world.maps, world.levels, world.ids, targets)
    monkeypatch.setenv("QUANTKIT_MEMORY", "1GB")
    parent = middle(world)
    fitness.set_parent(parent)
    brought: list[int | None] = []
    weights = model._weights
    assert weights is not None
    bring = weights.bring
    monkeypatch.setattr(weights, "bring", lambda block: (brought.append(block), bring(block)))
    fitness.kl(parent, 0, N_SEQUENCES)
    assert brought == [0, 1, 2]
    fitness.kl(world.change(parent, "layers.1.self_attn.q_proj"), 0, N_SEQUENCES)
    assert brought == [0, 1, 2, 1, 2]


PARTS = ("layers.0.mlp", "layers.1.self_attn.q_proj", "layers.2.mlp.down", "lm_head", "embed")


@pytest.mark.parametrize("part", PARTS)
def test_cutting_the_pass_short_changes_nothing(world: World, part: str) -> None:
    """A candidate evaluated from the parent's cached states and from scratch: the same bits."""
    parent = middle(world)
    child = world.change(parent, part)
    cached, fresh = world.fitness(), world.fitness()
    cached.set_parent(parent)
    cached.kl(parent, 0, N_SEQUENCES)
    short = cached.kl(child, 0, N_SEQUENCES)
    assert np.array_equal(short, fresh.kl(child, 0, N_SEQUENCES))
    assert np.array_equal(cached.kl(parent, 0, N_SEQUENCES), fresh.kl(parent, 0, N_SEQUENCES))


def test_the_order_of_candidates_does_not_show(world: World) -> None:
    parent = middle(world)
    children = [world.change(parent, part) for part in PARTS]
    one, other = world.fitness(), world.fitness()
    for fitness in (one, other):
        fitness.set_parent(parent)
        fitness.kl(parent, 0, N_SEQUENCES)
    forward = [one.kl(c, 0, N_SEQUENCES) for c in children]
    backward = [other.kl(c, 0, N_SEQUENCES) for c in reversed(children)]
    assert all(np.array_equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_a_new_parent_forgets_the_old_ones_states(world: World) -> None:
    fitness, fresh = world.fitness(), world.fitness()
    for parent in (world.space.smallest, middle(world)):
        fitness.set_parent(parent)
        fitness.kl(parent, 0, N_SEQUENCES)
    child = world.change(middle(world), "layers.2.mlp")
    assert np.array_equal(fitness.kl(child, 0, 8), fresh.kl(child, 0, 8))


def test_a_part_of_the_sequences(world: World) -> None:
    """The first round asks for fewer sequences than the parent's states hold."""
    parent = middle(world)
    child = world.change(parent, "layers.1.mlp")
    cached, fresh = world.fitness(), world.fitness()
    cached.set_parent(parent)
    cached.kl(parent, 0, N_SEQUENCES)
    found = cached.kl(child, 0, 2)
    assert found.shape == (2, CHUNKS)
    assert np.array_equal(found, fresh.kl(child, 0, 2))
    with pytest.raises(ValueError, match="whole batches"):
        cached.kl(child, 0, cached.n_batch - 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kl_in_16_bits(world: World, device: str) -> None:
    """The residual stream and the logits stay in float32: little is lost."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    fitness = world.fitness(dtype=torch.bfloat16, device=device)
    (done,) = fitness._run([fitness._begin(None, 0, 2)])
    assert done.hidden.dtype == fitness._model.head(done.hidden).dtype == torch.float32
    found = fitness.kl(middle(world), 0, N_SEQUENCES).mean()
    assert found == pytest.approx(world.true_kl(middle(world)).mean(), rel=0.05)


def test_a_search_resumed_ends_the_same(untied: World) -> None:
    """From every saved state, with a fresh evaluator, as after kill -9."""
    plan = Schedule(n_tokens=8_000, rounds=(2, 4), n_kept=(1, 1), patience=99)
    rng = np.random.default_rng(0)
    costs = [np.sort(rng.random(3))[::-1] for _ in untied.names]
    fitness = untied.fitness()
    proposals = [(c, "uniform") for c in uniform(untied.space, costs)]
    saved = [begin(fitness, plan, proposals, 1)]
    final = evolve(untied.space, fitness, costs, plan, saved[0], saved.append)
    assert len(saved) > 6
    for state in saved[1:-1:2]:
        loaded = build(SearchState, json.loads(json.dumps(to_json(state))))
        end = evolve(untied.space, untied.fitness(), costs, plan, loaded, lambda _: None)
        assert to_json(end) == to_json(final)


def test_tensors_that_cannot_be_put_into_the_model(world: World) -> None:
    """The search notes that their damage is estimated only; the evaluator must then leave them."""
    maps = dict(world.maps)
    del maps["model.layers.1.mlp.up_proj.weight"]
    fitness = Fitness(
        BlockwiseModel(copy.deepcopy(world.model)),
        world.space,
        maps,
        world.levels,
        world.ids,
        world.folder / "targets.partial",
    )
    parent = middle(world)
    child = world.change(parent, "layers.1.mlp.up_proj")
    fitness.set_parent(parent)
    assert np.array_equal(fitness.kl(parent, 0, 4), fitness.kl(child, 0, 4))


def test_what_sees_is_left_as_it_is(tmp_path: Path) -> None:
    folder = write_checkpoint(FAMILIES["Gemma 3 multimodal"], tmp_path)
    model = BlockwiseModel(load_model(folder, torch.bfloat16))
    precision.prepare(model)

    def types(pattern: str) -> set[torch.dtype]:
        return {p.dtype for n, p in model.model.named_parameters() if re.search(pattern, n)}

    assert types("vision_tower") == types(r"layers\.\d+\.mlp") == {torch.bfloat16}
    assert types("embed_tokens|language_model.norm") == {torch.float32}


def test_other_tables_are_left_as_they_are(tmp_path: Path) -> None:
    model = BlockwiseModel(
        load_model(write_checkpoint(FAMILIES["Gemma 4"], tmp_path), torch.bfloat16)
    )
    precision.prepare(model)
    for name, parameter in model.model.named_parameters():
        if "embed_tokens" in name:
            wide = "per_layer" not in name
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_targets_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, four rows at a time: very peaked, flat, and with probabilities down to
    1e-20. Logits around 100 are themselves no better than 5e-6 in float32.
    """
    monkeypatch.setattr("quantkit.search.targets._VALUES_AT_ONCE", 2000)
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 0.1, 1.0, 3.0, 8.0, 30.0])
    base = torch.randn(6, 500, generator=generator) * scales[:, None]
    other = base + 0.1 * torch.randn(6, 500, generator=generator)
    targets = Targets(tmp_path / "t", 10, 500, torch.device("cpu"))
    targets.put(3, base)
    p, q = (torch.log_softmax(x.double(), -1) for x in (base, other))
    wanted = (p.exp() * (p - q)).sum(-1)
    found = targets.kl(3, other)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=5e-6)


def test_targets_of_the_most_likely_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL over the partition into these tokens and all others, which is below the KL over all,
    and what it is where all are kept.
    """
    monkeypatch.setattr("quantkit.search.targets._VALUES_AT_ONCE", 2000)
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 0.1, 1.0, 3.0, 8.0, 30.0])
    base = torch.randn(6, 500, generator=generator) * scales[:, None]
    other = base + 0.1 * torch.randn(6, 500, generator=generator)
    p, q = (torch.log_softmax(x.double(), -1) for x in (base, other))
    whole = (p.exp() * (p - q)).sum(-1)
    for n in (1, 40, 499, 500):
        monkeypatch.setattr("quantkit.search.targets.MOST_TOKENS", n)
        path = tmp_path / str(n)
        targets = Targets(path, 10, 500, torch.device("cpu"))
        targets.put(3, base)
        assert path.stat().st_size == 10 * 6 * n == target_bytes(10, 500)
        ids = p.topk(n).indices
        kept = p.gather(-1, ids), q.gather(-1, ids)
        left = [(1 - x.exp().sum(-1)).clamp(min=1e-300) for x in kept]
        parts = (kept[0].exp() * (kept[0] - kept[1])).sum(-1)
        parts += left[0] * (left[0].log() - left[1].log()) if n < 500 else 0
        found = targets.kl(3, other)
        torch.testing.assert_close(found, parts, rtol=2e-3, atol=5e-6)
        assert bool((found < whole * 1.002 + 5e-6).all())


@pytest.mark.parametrize("qtype", sorted(FORMATS), ids=str)
def test_rows_decoded_some_at_a_time(qtype: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does, in parts: what libggml makes of the same bytes."""
    rows = np.random.default_rng(0).standard_normal((7, 512), np.float32)
    packed = native.quantize(rows, qtype)
    monkeypatch.setattr(decode, "AT_ONCE", 3 * 512)
    found = decode.decoded(FORMATS[qtype], torch.from_numpy(packed), 512)
    assert torch.equal(found, torch.from_numpy(native.dequantize(packed, qtype)))
