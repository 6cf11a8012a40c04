"""Find out what an adapter does to which tensor of its base, as PEFT does it, from names and shapes
alone, before any weight is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.checkpoint.adapter import MERGE, Adapter
from quantkit.checkpoint.info import shown
from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.errors import QuantkitError
from quantkit.sources.lora_targets import strengths

_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_(?:(embedding_)([AB])(?:\.default)?|([AB])(?:\.default)?\.weight)")
_FLOATS = ("BF16", "F16", "F32", "F64")
_OTHER_BASE = "Check that the adapter names the right base, or merge it yourself with peft."


@dataclass(frozen=True)
class Base:
    """The base as transformers makes it: its modules' kinds ("linear", "transposed", "table" or
    "other") and which of them look tokens up and predict them, with one table or two.
    """

    kinds: Mapping[str, str]
    embedding: str
    head: str
    is_tied: bool


@dataclass(frozen=True)
class Change:
    """A tensor of the adapter that replaces the base's, and a product that is added: of the
    tensors `b` and `a`, scaled. Both may be.
    """

    whole: str | None = None
    b: str | None = None
    a: str | None = None
    scale: float = 0.0
    is_transposed: bool = False

    @property
    def is_any(self) -> bool:
        return self.whole is not None or self.a is not None


@dataclass(frozen=True)
class Changes:
    """By tensor of the base. Where only one of two tied tables is changed they are untied: `head`
    is then the name of the head's own tensor if it is not stored yet, the name of the table that
    it was, and what becomes of it.
    """

    of: Mapping[str, Change]
    is_untied: bool = False
    head: tuple[str, str, Change] | None = None
    same: tuple[tuple[str, str], ...] = ()  # tensors of the adapter that have to be equal


def base_of(folder: Path) -> Base:
    """Make the base from the config in `folder`. Raises QuantkitError when transformers cannot make
    the model.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from quantkit.model.blockwise import empty_model

    model = empty_model(folder)
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()

    def kind(module: nn.Module) -> str:
        known = {nn.Linear: "linear", Conv1D: "transposed", nn.Embedding: "table"}
        return next((kind for cls, kind in known.items() if isinstance(module, cls)), "other")

    kinds = {name: kind(module) for name, module in model.named_modules()}
    return Base(kinds, names[id(table)], names[id(head)], head.weight is table.weight)


def changes(
    adapter: Adapter,
    tensors: Mapping[str, StoredTensor],
    stored: Mapping[str, StoredTensor],
    base: Base,
) -> Changes:
    """Return what the adapter's `tensors` do to the base's `stored` ones.

    Raises QuantkitError where a part of the adapter has no place in the base, and where PEFT would
    leave a part out or draw one at random.
    """
    pairs, whole = _sorted_out(tensors.values())
    if not pairs and not whole:
        raise QuantkitError("The adapter changes nothing: it has no tensors.", MERGE)
    found: dict[str, Change] = {name: Change(whole=key) for name, key in whole.items()}
    asked = strengths(adapter, [_module(m, base) for m in pairs], base.head)
    for module, pair in pairs.items():
        strength, kind = asked[_module(module, base)], base.kinds.get(_module(module, base))
        is_twin = adapter.is_tied and base.is_tied and _module(module, base) == base.head
        if not strength.is_target and not is_twin:
            raise QuantkitError(
                f"The adapter has tensors of {shown(module)}, but its settings leave that out:"
                " PEFT would ignore them.",
                MERGE,
            )
        rank = _rank(module, pair, tensors, strength.rank)
        if kind == "other" or (kind == "table") != pair["A"].rpartition(".")[2].startswith(
            "lora_embedding"
        ):
            raise QuantkitError(
                f"The adapter's {shown(module)} is not a linear layer.", _OTHER_BASE
            )
        scale = strength.alpha / (rank**0.5 if adapter.use_rslora else rank)
        found[f"{module}.weight"] = Change(
            whole.get(f"{module}.weight"),
            pair["B"],
            pair["A"],
            scale,
            is_transposed=kind in ("transposed", "table"),
        )
    _check_complete(adapter, found, base)
    made = _placed(adapter, found, list(stored), base)
    for name, change in made.of.items():
        _check_shape(name, change, tensors, stored[name])
    if made.head is not None:
        _check_shape(made.head[0], made.head[2], tensors, stored[made.head[1]])
    return made


def _sorted_out(
    tensors: Iterable[StoredTensor],
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The adapter's tensors: lora_A and lora_B by module, and those that replace the base's."""
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for tensor in tensors:
        key = tensor.name
        if tensor.dtype not in _FLOATS:
            raise QuantkitError(f"The adapter's {shown(key)} is of type {tensor.dtype}.", MERGE)
        part = _PART.fullmatch(key)
        if part is None and ".lora_" in key:
            raise QuantkitError(
                f"The adapter has {shown(key)}, which cannot be merged: only lora_A and lora_B of"
                " linear layers and tables can.",
                MERGE,
            )
        if part is not None:
            place, name = pairs.setdefault(part[1].removeprefix(_PREFIX), {}), part[3] or part[4]
        else:  # a module that was trained whole (modules_to_save), or a bias
            plain = re.sub(r"\.(modules_to_save|base_layer)(\.default)?(?=\.)", "", key)
            place, name = whole, plain.removeprefix(_PREFIX)
        if name in place:
            raise QuantkitError(f"The adapter has {shown(key)} twice, under two names.", MERGE)
        place[name] = key
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise QuantkitError(
                f"The adapter has no complete lora_A and lora_B of {shown(module)}.", MERGE
            )
    return pairs, whole


def _module(name: str, base: Base) -> str:
    """The module as transformers calls it, where that is known; adapters may be older."""
    if name in base.kinds:
        return name
    near = [n for n in base.kinds if n and _is_near(name, n)]
    return near[0] if len(near) == 1 else name


def _is_near(name: str, known: str) -> bool:
    """Whether these are the same but for the names of outer modules: layers are numbered alike."""
    tail = name[found.start() :] if (found := re.search(r"\blayers\.\d", name)) else name
    return name.endswith(f".{known}") or known.endswith(f".{tail}")


def _rank(
    module: str, pair: Mapping[str, str], tensors: Mapping[str, StoredTensor], asked: int | None
) -> int:
    a, b = tensors[pair["A"]].shape, tensors[pair["B"]].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise QuantkitError(
            f"The adapter has no complete lora_A and lora_B of {shown(module)}:"
            f" they are {a} and {b}.",
            MERGE,
        )
    if asked is not None and asked != a[0]:
        raise QuantkitError(
            f"The adapter's {shown(module)} is of rank {a[0]}, but its settings say {asked}.", MERGE
        )
    return a[0]


def _check_complete(adapter: Adapter, found: Mapping[str, Change], base: Base) -> None:
    """Modules that the settings name and the file lacks: PEFT refuses those that were trained
    whole, and leaves others as they were begun, which is without effect or at random.
    """
    modules = {_module(name.rpartition(".")[0], base) for name in found}
    for end in adapter.whole:
        wanted = [n for n, kind in base.kinds.items() if n.endswith(end) and kind != "other"]
        lacking = [name for name in wanted if name not in modules]
        if lacking:
            raise QuantkitError(
                f"The adapter lacks {shown(lacking[0])}, which its settings name as fully trained.",
                MERGE,
            )
    if adapter.is_drawn and adapter.targets is not None:
        linears = [n for n, kind in base.kinds.items() if kind in ("linear", "transposed")]
        asked = strengths(adapter, linears, base.head)
        lacking = [name for name in linears if asked[name].is_target and name not in modules]
        if lacking:
            raise QuantkitError(
                f"The adapter lacks {shown(lacking[0])}, which its settings name: PEFT would draw"
                " it at random.",
                MERGE,
            )


def _placed(adapter: Adapter, found: Mapping[str, Change], names: list[str], base: Base) -> Changes:
    """The changes by the names of the base's tensors. Of two tied tables each has its own."""
    table, head = f"{base.embedding}.weight", f"{base.head}.weight"
    tables, is_stored = {name: _table(name, base) for name in found}, head in names
    made: dict[str, Change] = {}
    for name, change in found.items():
        if base.is_tied and not is_stored and tables[name] is not None:
            continue
        place = _place(name, names)
        if place in made:
            raise QuantkitError(f"The adapter changes {shown(place)} twice.", MERGE)
        made[place] = change
    own = {side: change for name, change in found.items() if (side := tables[name])}
    if not base.is_tied or not own:
        return Changes(made)
    if is_stored:  # transformers ties them only where they are equal
        return Changes(made, is_untied=not adapter.is_tied)
    both, same = _two_tables(adapter, own, base)
    place = _place(table, names)
    is_untied = both[table] != both[head]
    made |= {place: both[table]} if both[table].is_any else {}
    return Changes(made, is_untied, (head, place, both[head]) if is_untied else None, same)


def _table(name: str, base: Base) -> str | None:
    """The name of the embedding's or the head's weight, where this is it."""
    module = _module(name.removesuffix(".weight"), base)
    return f"{module}.weight" if module in (base.embedding, base.head) else None


def _two_tables(
    adapter: Adapter, own: Mapping[str, Change], base: Base
) -> tuple[dict[str, Change], tuple[tuple[str, str], ...]]:
    """What becomes of the embedding and of the head, whose table is one.

    PEFT copies a module that is trained whole, and adds a LoRA to what one of them computes: the
    other keeps the old table. What is stored beside it as the base's own is both's.
    """
    table, head = f"{base.embedding}.weight", f"{base.head}.weight"
    copied = {
        name: any(module.endswith(end) for end in adapter.whole)
        for name, module in ((table, base.embedding), (head, base.head))
    }
    of_both = [c.whole for n, c in own.items() if c.whole is not None and not copied[n]]
    same = tuple((of_both[0], other) for other in of_both[1:])
    shared = of_both[0] if of_both else None
    made = {}
    for name in (table, head):
        change = own.get(name, Change())
        made[name] = change if copied[name] else replace(change, whole=shared)
    if adapter.is_tied:
        if made[table].a and made[head].a and made[table].scale != made[head].scale:
            raise QuantkitError("The adapter's two tied tables have two scales.", MERGE)
        same += _equal(made[table], made[head])
        only = made[table] if made[table].is_any else made[head]
        made = {table: only, head: only}
    return made, same


def _equal(one: Change, other: Change) -> tuple[tuple[str, str], ...]:
    """The tensors that have to be equal so that both do the same."""
    if not (one.is_any and other.is_any):
        return ()
    parts = [(one.whole, other.whole), (one.a, other.b), (one.b, other.a)]
    return tuple((x, y) for x, y in parts if x is not None and y is not None and x != y)


def _place(name: str, names: Iterable[str]) -> str:
    """The base's tensor of this name; checkpoints leave outer modules out, or name them otherwise,
    but number layers alike.
    """
    if name in names:
        return name
    near = [n for n in names if _is_near(name, n)]
    if len(near) != 1:
        raise QuantkitError(
            f"The adapter changes {shown(name)}, but its base has "
            f"{'no such tensor' if not near else f'{len(near)} such tensors'}.",
            _OTHER_BASE,
        )
    return near[0]


def _check_shape(
    name: str, change: Change, tensors: Mapping[str, StoredTensor], stored: StoredTensor
) -> None:
    shapes = [] if change.whole is None else [tensors[change.whole].shape]
    if change.a is not None and change.b is not None:
        delta = (tensors[change.b].shape[0], tensors[change.a].shape[1])
        shapes.append(delta[::-1] if change.is_transposed else delta)
    if stored.dtype not in _FLOATS:
        raise QuantkitError(
            f"The base of the adapter is quantized ({stored.dtype}): there is nothing to add to.",
            "Name its full-precision original in adapter_config.json of a local copy.",
        )
    for shape in shapes:
        if shape != stored.shape:
            raise QuantkitError(
                f"The adapter's {shown(name)} is {shape}, but its base's is {stored.shape}.",
                "It was trained on another base, or with a larger vocabulary: merge it yourself"
                " (peft's resize_token_embeddings and merge_and_unload).",
            )
