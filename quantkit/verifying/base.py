"""The full-precision file, which no repository of ours holds: made again from the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantkit import pipeline
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.errors import QuantkitError
from quantkit.evidence.receipt import Receipt
from quantkit.files import sha256_file
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.run.events import Event
from quantkit.run.folder import RunDir
from quantkit.verifying.findings import Finding

_NAME = "full-precision file"


@dataclass(frozen=True)
class Base:
    """The file, if there is one, and what is to be said of it."""

    path: Path | None
    finding: Finding


def find_base(
    receipt: Receipt, given: Path | None, folder: Path, echo: Callable[[Event], None]
) -> Base:
    """Return the file `given`, or make it in `folder` from the model and commit that the receipt
    names, as `quantkit run` does.
    """
    try:
        path = given or _made(receipt, folder, echo)
        check_sound(GgufFile(path))
    except QuantkitError as error:
        return Base(None, Finding(_NAME, None, str(error).rstrip(".")))
    if sha256_file(path) == receipt.base.sha256:
        about = "equal to the one that was measured" + ("" if given else ", made again here")
        return Base(path, Finding(_NAME, True, about))
    about = "it is not the one that was measured: its sha256 is another"
    if not given:
        about += f", though it was made of {receipt.source} at {receipt.revision}"
    return Base(path, Finding(_NAME, None, about))


def _made(receipt: Receipt, folder: Path, echo: Callable[[Event], None]) -> Path:
    if receipt.source is None:
        raise QuantkitError(
            "The file was made of a folder that the receipt does not give.",
            "Give the full-precision GGUF with --base.",
        )
    if receipt.source == DEMO_MODEL:
        config = RunConfig(DEMO_MODEL)
    else:
        from quantkit import hub

        reference = hub.parse_reference(receipt.source, receipt.revision, allow_local=False)
        config = RunConfig(reference.id, revision=reference.revision)
    pipeline.run(config, folder, echo, until="convert")
    return RunDir(folder).artifacts.base
