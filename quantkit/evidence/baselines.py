"""The files that a result is compared with: llama.cpp's own files around its size, our uniform
files, and those that the user names. Nothing is made or downloaded before it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quantkit.config.levels import around
from quantkit.evidence.report.schema import GIVEN, STOCK, UNIFORM
from quantkit.ggml.native import Floats
from quantkit.ggml.types import FILE_TYPES, QUANTIZED, STOCK_MIXES
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.hub import given
from quantkit.llamacpp.stock import StockRecipe, make_stock, stock_bytes


@dataclass(frozen=True)
class Baseline:
    """A file to measure. `open()` gives its path for as long as it is needed; `is_rival` marks
    those that are looked at most closely: the largest stock file of at most our size, and what the
    user named.
    """

    kind: str
    name: str
    open: Callable[[], AbstractContextManager[Path]]
    is_rival: bool = False


def stock_baselines(
    base: GgufFile,
    sizes: Mapping[int, str | None],
    n_below: int,
    imatrix: Mapping[str, Floats],
    folder: Path,
) -> list[Baseline]:
    """Return for each of our files, given by bytes with the label it was asked to be like: the
    `n_below` largest stock files of at most its size, the next larger one, and the one it is like.
    Each is made by llama.cpp in `folder` when it is opened, with the same imatrix, and deleted
    afterwards.
    """
    weights = {recipe: stock_bytes(base, recipe) for recipe in _recipes()}
    chosen: dict[StockRecipe, bool] = {}
    for n_bytes, liked in sizes.items():
        around = stock_around(weights, n_bytes, n_below, liked)
        rival = max(
            (r for r in around if weights[r] <= n_bytes), key=lambda r: weights[r], default=None
        )
        for recipe in around:
            chosen[recipe] = chosen.get(recipe, False) or recipe == rival
    return [
        Baseline(STOCK, str(r), partial(_made, base.path, r, imatrix, folder), is_rival)
        for r, is_rival in chosen.items()
    ]


def _recipes() -> list[StockRecipe]:
    """Mixes and pure files alike."""
    pure = [q.name for q in QUANTIZED if q.name in FILE_TYPES and q.name in STOCK_MIXES]
    return [StockRecipe(m) for m in STOCK_MIXES] + [StockRecipe(name, pure=True) for name in pure]


def stock_around(
    weights: Mapping[StockRecipe, int], n_bytes: int, n_below: int, liked: str | None
) -> list[StockRecipe]:
    """Return the recipes of `stock_baselines` for one file by size, with the one that it is like
    last. `weights` are the bytes of every recipe's file.
    """
    # Of two files of one size the mix is the better known name.
    by_size = {
        size: recipe for recipe, size in sorted(weights.items(), key=lambda item: not item[0].pure)
    }
    below = sorted((size for size in by_size if size <= n_bytes), reverse=True)[:n_below]
    above = sorted(size for size in by_size if size > n_bytes)[:1]
    chosen = [by_size[size] for size in [*sorted(below), *above]]
    asked = [recipe for recipe in weights if recipe.label == liked and not recipe.pure]
    return chosen + [recipe for recipe in asked if recipe not in chosen]


def uniform_baselines(levels: Path, sizes: Sequence[int], n_around: int) -> list[Baseline]:
    """Return files of one level in the folder `levels`, quantized like the result but not searched:
    those `around` the sizes.
    """
    paths = {path: path.stat().st_size for path in sorted(levels.glob("*.gguf"))}
    chosen = around(paths, sizes, n_around)
    return [Baseline(UNIFORM, p.stem, partial(as_it_is, p)) for p in chosen]


def given_baselines(names: Sequence[str]) -> list[Baseline]:
    """Return what the user named; one on the Hub is downloaded when it is opened. Opening a broken
    one raises QuantkitError.
    """
    shown = zip(given.short_names(names), names, strict=True)
    return [Baseline(GIVEN, short, partial(_located, name), is_rival=True) for short, name in shown]


@contextmanager
def as_it_is(path: Path) -> Iterator[Path]:
    """Yield a file that exists already, and leave it there."""
    yield path


@contextmanager
def _located(name: str) -> Iterator[Path]:
    path = given.locate(name)
    check_sound(GgufFile(path))
    yield path


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
