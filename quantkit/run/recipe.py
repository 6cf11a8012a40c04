"""What makes a finished file again, as it is published beside the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.files import write_json
from quantkit.ggml.types import FILE_TYPES, QuantType
from quantkit.run.folder import MadeOn, read_json
from quantkit.sandbox.untrusted import build
from quantkit.tensors import Fallback, FilePart, to_json


@dataclass(frozen=True)
class Provenance:
    """What the output's metadata says of how it was made. Known before the search, so that sizes
    are exact.
    """

    revision: str  # of the model, a commit or a hash of the folder
    datasets: tuple[str, ...]
    n_imatrix_entries: int
    n_imatrix_chunks: int


@dataclass(frozen=True)
class Pinned:
    """A model at a commit."""

    model: str
    revision: str


@dataclass(frozen=True)
class Base:
    """The full-precision file."""

    sha256: str
    n_bytes: int


@dataclass(frozen=True)
class Published:
    """The finished file."""

    file: str
    n_bytes: int
    sha256: str
    label: str
    parts: tuple[FilePart, ...] = ()  # what is published in its place, where it is too large


@dataclass(frozen=True)
class Stored:
    """How a tensor is stored, and the name of the file that its bytes come from."""

    qtype: QuantType
    method: str
    file: str


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a finished file again."""

    schema: int = field(default=1, init=False)
    quantkit: str
    model: str
    revision: str
    adapter_of: Pinned | None = field(default=None, kw_only=True)
    made_on: dict[str, MadeOn] = field(default_factory=dict, kw_only=True)  # by stage
    config: RunConfig
    base: Base
    output: Published
    provenance: Provenance
    calibration: object  # calibration.json
    levels: dict[str, str]  # level file, or base.gguf -> sha256
    tensors: dict[str, Stored]
    fallbacks: tuple[Fallback, ...]

    @property
    def types(self) -> dict[str, QuantType]:
        return {name: tensor.qtype for name, tensor in self.tensors.items()}

    def write(self, path: Path) -> Path:
        """Write it as JSON; nothing is said of adapters or parts where there are none."""
        value = to_json(self)
        if self.adapter_of is None:
            del value["adapter_of"]
        if not self.output.parts:
            del value["output"]["parts"]
        return write_json(path, value)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Raise QuantkitError for what is not a recipe; it may come from anywhere."""
        try:
            value = read_json(path)
            if isinstance(value, dict) and value.get("schema", 1) != 1:
                raise QuantkitError("The recipe has another version.", "Use a newer quantkit.")
            recipe = build(cls, value)
            _check(recipe)
        except (OSError, ValueError) as error:
            raise QuantkitError(
                f"{path} is not a recipe ({error}).",
                "Give the GGUF's file under recipes/.",
            ) from None
        return recipe


def _check(recipe: Recipe) -> None:
    """Raises ValueError for names that are not what they should be."""
    if recipe.output.label not in FILE_TYPES:
        raise ValueError(f"there is no stock mix {recipe.output.label!r}")
    for file in recipe.levels:
        if Path(file).name != file:
            raise ValueError(f"{file!r} is not the name of a file")
    for name, tensor in recipe.tensors.items():
        if tensor.file not in recipe.levels:
            raise ValueError(f"{name} comes from {tensor.file!r}, which is not a level file")
