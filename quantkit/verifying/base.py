"""The full-precision file, which no repository of ours holds: made again from the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit import hub, pipeline
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
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    revision = None if receipt.source == DEMO_MODEL else receipt.revision
    if receipt.source != DEMO_MODEL and not _COMMIT.fullmatch(revision or ""):
        raise QuantkitError(
            "The receipt names no commit of the model.", "Give the full-precision GGUF with --base."
        )
    reference = hub.parse_reference(receipt.source, revision, allow_local=False)
    # Nothing but the file is made; a run that is to make little is estimated to need little disk.
    little = RunConfig(reference.id, levels=("Q8_0",), types=(("default", "Q8_0"),))
    config = replace(little, revision=reference.revision, methods=("rtn",), profile="demo")
    pipeline.run(config, folder, echo, until="convert")
    return RunDir(folder).artifacts.base
