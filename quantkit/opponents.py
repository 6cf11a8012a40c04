"""What a result is measured beside: llama.cpp's own files around its size, our uniform files, and
whatever the user names. Nothing is made or downloaded before it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantkit import given
from quantkit.config import Target
from quantkit.ggufio.read import GgufFile
from quantkit.kquants.native import Floats
from quantkit.kquants.stock import STOCK_MIXES, StockRecipe, make_stock, stock_bytes
from quantkit.qtypes import FILE_TYPES, QUANTIZED
from quantkit.report.schema import GIVEN, STOCK, UNIFORM


@dataclass(frozen=True)
class Opponent:
    """A file to measure. `open()` gives its path for as long as it is needed; `is_rival` marks the
    largest stock file of at most our size, which is looked at most closely.
    """

    kind: str
    name: str
    open: Callable[[], AbstractContextManager[Path]]
    is_rival: bool = False


def stock_opponents(
    base: GgufFile,
    n_bytes: int,
    n_below: int,
    target: Target | None,
    imatrix: Mapping[str, Floats],
    folder: Path,
) -> list[Opponent]:
    """The `n_below` largest stock files of at most `n_bytes`, the next larger one, and the one that
    the target asks to be like. Each is made by llama.cpp in `folder` when it is opened, with the
    same imatrix, and deleted afterwards.
    """
    recipes = stock_around(base, n_bytes, n_below, target)
    sizes = {recipe: stock_bytes(base, recipe) for recipe in recipes}
    rival = max((r for r in recipes if sizes[r] <= n_bytes), key=lambda r: sizes[r], default=None)
    return [
        Opponent(STOCK, str(r), partial(_made, base.path, r, imatrix, folder), r == rival)
        for r in recipes
    ]


def stock_around(
    base: GgufFile, n_bytes: int, n_below: int, target: Target | None
) -> list[StockRecipe]:
    """The recipes of `stock_opponents`, mixes and pure files alike, by size; the asked one last."""
    recipes = [StockRecipe(label) for label in STOCK_MIXES]
    recipes += [
        StockRecipe(q.name, pure=True)
        for q in QUANTIZED
        if q.name in FILE_TYPES and q.name in STOCK_MIXES
    ]
    sizes = {recipe: stock_bytes(base, recipe) for recipe in recipes}
    # Of two files of one size the mix is the better known name.
    by_size = {
        size: recipe for recipe, size in sorted(sizes.items(), key=lambda item: not item[0].pure)
    }
    below = sorted((size for size in by_size if size <= n_bytes), reverse=True)[:n_below]
    above = sorted(size for size in by_size if size > n_bytes)[:1]
    chosen = [by_size[size] for size in [*sorted(below), *above]]
    liked = StockRecipe(target.value) if target and target.kind == "like" else None
    if liked and liked.label in STOCK_MIXES and sizes[liked] not in (*below, *above):
        chosen.append(liked)
    return chosen


def uniform_opponents(levels: Path, n_bytes: int) -> list[Opponent]:
    """Files of one level in the folder `levels`, quantized like the result but not searched: the
    largest of at most `n_bytes` and the next larger one.
    """
    paths = sorted(levels.glob("*.gguf"), key=lambda path: path.stat().st_size)
    below = [path for path in paths if path.stat().st_size <= n_bytes][-1:]
    above = [path for path in paths if path.stat().st_size > n_bytes][:1]
    return [Opponent(UNIFORM, p.stem, partial(as_it_is, p)) for p in [*below, *above]]


def given_opponents(names: Sequence[str]) -> list[Opponent]:
    """What the user named; one on the Hub is downloaded when it is opened."""
    return [Opponent(GIVEN, n.rsplit("/", 1)[-1], partial(_located, n)) for n in names]


@contextmanager
def as_it_is(path: Path) -> Iterator[Path]:
    """A file that is there already, and stays."""
    yield path


@contextmanager
def _located(name: str) -> Iterator[Path]:
    yield given.locate(name)


@contextmanager
def _made(
    base: Path, recipe: StockRecipe, imatrix: Mapping[str, Floats], folder: Path
) -> Iterator[Path]:
    path = folder / f"stock-{recipe.label}{'-pure' if recipe.pure else ''}.gguf"
    try:
        make_stock(base, path, recipe, imatrix)
        yield path
    finally:
        path.unlink(missing_ok=True)
