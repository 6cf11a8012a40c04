"""The level file of a tuned allocation: a whole GGUF whose tensors are those of an allocation,
tuned where that brought the file nearer to the original.

The unit of work is a block: the file is laid out at once and filled block by block; what is done is
noted in `tuning.partial.json`. `outcome.json` says what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.config import TUNING_BATCH
from quantkit.files import PARTIAL, write_json
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.write import Layout, SlotFile
from quantkit.ranks.group import ALONE, Ranks
from quantkit.run.folder import read_as
from quantkit.sizes import size
from quantkit.tensors import CARRIED, EXACT, Candidate

if TYPE_CHECKING:
    from quantkit.model.blockwise import BlockwiseModel
    from quantkit.tuning.tuner import Stored, TunedBlock, Tuner

_PREFIX = "tuned-"
_DONE, _OUTCOME = "tuning.partial.json", "outcome.json"
FLOAT32_ABOVE_BPW = 6.5  # near 8 bits 16-bit products are noisier than the files are

HELDOUT = 32  # sequences that say whether tuning helped

Progress = Callable[[int, int, str], None]


def is_tuned(file: str) -> bool:
    """Return whether a level file of this name was tuned after the search."""
    return file.startswith(_PREFIX)


@dataclass(frozen=True)
class Outcome:
    """The result of tuning. KL(original || file) in nats per token on held-out sequences, of the
    allocation and of the tuned file; `tensors` are those that changed, none where that did not
    help; errors of blocks are squared, over the power of the original's output.
    """

    n_steps: int
    kl_before: float
    kl_after: float
    errors: tuple[tuple[float, float], ...]
    tensors: tuple[str, ...]

    @property
    def in_short(self) -> Tuned:
        return Tuned(self.n_steps, self.kl_before, self.kl_after, len(self.tensors))

    @classmethod
    def load(cls, folder: Path) -> Outcome | None:
        """Return what `tune_file` wrote next to its file, None where nothing was tuned."""
        path = folder / _OUTCOME
        return read_as(cls, path) if path.exists() else None


@dataclass(frozen=True)
class Tuned:
    """What the report says of an outcome."""

    steps: int
    kl_before: float
    kl_after: float
    n_tensors: int


@dataclass(frozen=True)
class NotTuned:
    """Why a file was not tuned although that was asked for."""

    steps: int = field(default=0, init=False)
    reason: str


@dataclass(frozen=True)
class Tunings:
    """`tuning.json`, by the bytes of the budget; of budgets with one file the smallest."""

    schema: int = field(default=1, init=False)
    budgets: dict[str, Tuned | NotTuned]


@dataclass(frozen=True)
class _DoneBlock:
    """A block that is finished: its error before and after, and the tensors that changed."""

    errors: tuple[float, float]
    tensors: tuple[str, ...]


def lack_of_memory(needed: int, free: int) -> str:
    """Return why files are not tuned where memory is missing; empty where there is enough."""
    if needed <= free:
        return ""
    return f"tuning takes {size(needed)}, but only {size(free)} are free"


def load_stored(chosen: Mapping[str, Candidate], levels: Mapping[str, Path]) -> dict[str, Stored]:
    """Load tensors by name from level files, each as its candidate says."""
    from quantkit.tuning.tuner import Stored

    files = {file: GgufFile(levels[file]) for file in sorted({c.file for c in chosen.values()})}
    return {
        n: Stored(c.qtype, files[c.file].packed(n), c.method in (EXACT, CARRIED))
        for n, c in chosen.items()
    }


def load_tuner(
    model: BlockwiseModel,
    row_maps: Path,
    tokens: Path,
    stored: Mapping[str, Stored],
    n_steps: int,
    scratch: Path,
    exact: bool,
    ranks: Ranks = ALONE,
) -> Tuner:
    """Return what tunes the tensors of `stored`, with the row maps and the tokens of these files;
    for the others see `Tuner`.
    """
    from safetensors.torch import load_file

    from quantkit.model.row_maps import load_row_maps
    from quantkit.tuning.tuner import Effort, Tuner

    ids, effort = load_file(tokens), Effort(n_steps, TUNING_BATCH)
    train, heldout = ids["train"], ids["heldout"][:HELDOUT]
    maps = load_row_maps(row_maps)
    return Tuner(model, maps, stored, train, heldout, effort, scratch, exact, ranks)


def tune_file(
    path: Path,
    layout: Layout,
    base: GgufFile,
    stored: Mapping[str, Stored],
    tuning: Callable[[], AbstractContextManager[Tuner]],
    n_steps: int,
    progress: Progress,
) -> tuple[Outcome, list[Path]]:
    """Tune the tensors of `stored`, with what `tuning` gives; the others of the laid-out file are
    the base's. Goes on where it was. Returns the outcome and the files written: no GGUF where the
    KL did not fall.
    """
    known = Outcome.load(path.parent)
    if known is not None and path.exists() == bool(known.tensors):
        return known, _files(path, known)
    file, done_path = SlotFile(path, layout), path.with_name(_DONE)
    done: list[_DoneBlock] = []
    if file.resumed and done_path.exists():
        done = read_as(list[_DoneBlock], done_path)
    else:
        for name in base.tensors:
            file.write(name, stored[name].packed if name in stored else base.packed(name))
    with tuning() as tuner:
        for index in range(tuner.n_blocks):
            known_block = _read(done[index], file, stored) if index < len(done) else None
            block = tuner.block(index, known_block)
            if known_block is None:
                for name, rows in block.rows.items():
                    file.write(name, rows)
                file.flush()
                done.append(_DoneBlock((block.before, block.after), tuple(block.rows)))
                write_json(done_path, done)
            said = f"block {index + 1} of {tuner.n_blocks}: error {block.before:.2e}"
            said += f" -> {block.after:.2e}" if block.rows else ", kept as it was"
            progress(index + 1, tuner.n_blocks, said)
        before, after = tuner.kl()
    tensors = tuple(name for row in done for name in row.tensors) if after < before else ()
    outcome = Outcome(n_steps, before, after, tuple(row.errors for row in done), tensors)
    if tensors:
        file.finish()
    else:
        file.close()
        path.with_name(path.name + PARTIAL).unlink()
    write_json(path.with_name(_OUTCOME), outcome)
    done_path.unlink(missing_ok=True)
    return outcome, _files(path, outcome)


def _files(path: Path, outcome: Outcome) -> list[Path]:
    return [path.with_name(_OUTCOME), *([path] if outcome.tensors else [])]


def _read(row: _DoneBlock, file: SlotFile, stored: Mapping[str, Stored]) -> TunedBlock:
    """What an earlier run made of a block."""
    from quantkit.tuning.tuner import TunedBlock

    rows = {n: file.read(n).reshape(stored[n].packed.shape) for n in row.tensors}
    return TunedBlock(*row.errors, rows)
