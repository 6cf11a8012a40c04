"""Verify a published folder or repository: hashes, figures, and measurements made again."""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.errors import QuantkitError, UsageError
from quantkit.evidence import receipt as receipts
from quantkit.evidence.receipt import Receipt
from quantkit.evidence.receipt.make import LONG
from quantkit.evidence.receipt.schema import Changed
from quantkit.evidence.report.schema import OURS
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.run.events import Event
from quantkit.sandbox import untrusted
from quantkit.verifying.base import find_base
from quantkit.verifying.draw import N_WINDOWS, Drawn, everything, sample
from quantkit.verifying.figures import check_figures
from quantkit.verifying.findings import Finding, Verdict
from quantkit.verifying.places import CARD, Place, open_place
from quantkit.verifying.sums import check_files, expected

_MOST_TEXT = 256_000_000


@dataclass(frozen=True)
class Asked:
    """What to verify, and how much of it. `only`: of our files these, by name; `n_windows` None
    is all; `texts` and `items` are files in place of what could not be published; `work` keeps the
    full-precision file.
    """

    what: str
    revision: str | None = None
    only: tuple[str, ...] | None = None
    n_windows: int | None = N_WINDOWS
    seed: int | None = None
    base: Path | None = None
    texts: Mapping[str, Path] = field(default_factory=dict)
    items: Path | None = None
    device: str = "cpu"
    work: Path | None = None


def verify(asked: Asked, echo: Callable[[Event], None], note: Callable[[str], None]) -> Verdict:
    """Return the verdict on a folder or repository. What cannot be checked is a finding; raises
    UsageError for wrong use and QuantkitError where there is nothing to check.
    """
    place = open_place(asked.what, asked.revision)
    note(f"verifying {place.name}")
    try:
        receipt, sha256 = receipts.read(place.path(receipts.NAME))
    except Changed as error:
        return Verdict(place.name, (Finding(receipts.NAME, False, error.message.rstrip(".")),))
    about = f"whole, its sum is {sha256}"
    found = [Finding(receipts.NAME, True, about)]
    left_out = _left_out(receipt, asked.only)
    wanted = expected(receipt, place).keys() - left_out
    place = place.bring([*wanted, CARD, receipts.NAME])
    found += check_files(receipt, place, left_out)
    found += check_figures(receipt, sha256, place)
    texts, of_texts = _texts(receipt, place, asked.texts)
    files, of_files = _files(receipt, place, found, left_out)
    found += of_texts + of_files
    drawn = _draw(receipt, texts, asked)
    with ExitStack() as stack:
        folder = asked.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="quantkit-verify-"))
        )
        again = _measured(receipt, files, texts, drawn, asked, folder, echo, note)
    said = drawn.sentence if len(again) > 1 else "Nothing was measured again."
    not_covered = (*(f"{name}, as asked" for name in sorted(left_out)), *receipt.not_covered)
    return Verdict(place.name, (*found, *again), said, _notes(receipt), not_covered)


def _left_out(receipt: Receipt, only: tuple[str, ...] | None) -> set[str]:
    """The GGUFs, or their parts, that were not asked for. Raises UsageError for unknown names."""
    if only is None:
        return set()
    ours = _ours(receipt)
    if unknown := set(only) - ours:
        raise UsageError(
            f"The receipt has no file {min(unknown)}.", f"Its files: {', '.join(sorted(ours))}."
        )
    return {part for name in ours - set(only) for part in _parts(receipt, name)}


def _ours(receipt: Receipt) -> set[str]:
    """The names of our GGUFs that were measured."""
    ours = {w.file for w in receipt.windows if w.kind == OURS}
    return ours | {a.file for a in receipt.answers if a.kind == OURS}


def _parts(receipt: Receipt, name: str) -> tuple[str, ...]:
    """The files that one of ours is published in."""
    whole = receipt.joined.get(name)
    return whole.parts if whole else (name,)


def _draw(receipt: Receipt, texts: Mapping[str, str], asked: Asked) -> Drawn:
    if asked.n_windows is None:
        return everything(receipt, texts.keys())
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    return sample(receipt, texts.keys(), asked.n_windows, seed)


def _texts(
    receipt: Receipt, place: Place, given: Mapping[str, Path]
) -> tuple[dict[str, str], list[Finding]]:
    """The texts at hand that are the ones that were measured on, and what of the others."""
    texts: dict[str, str] = {}
    found = []
    for text in receipt.texts:
        if text.joins is not None:
            continue
        path = given.get(text.name) or (place.path(text.file) if text.file else None)
        name = f"text {text.name}"
        if path is None:
            about = f"it is not published; its source: {text.source}; give it with --text"
            found.append(Finding(name, None, about))
            continue
        try:
            data = untrusted.read_bytes(path, _MOST_TEXT)
            read = data.decode("utf-8")
        except (OSError, ValueError) as error:
            found.append(Finding(name, None, f"it cannot be read ({type(error).__name__})"))
            continue
        if hashlib.sha256(data).hexdigest() != text.sha256:
            found.append(Finding(name, False, "it is not the text that was measured on"))
            continue
        texts[text.name] = read
    for text in receipt.texts:
        if text.joins is not None and all(name in texts for name in text.joins):
            texts[text.name] = "\n\n".join(texts[name] for name in text.joins)
    if texts:
        about = f"{', '.join(n for n in texts if n != LONG)}: those that were measured on"
        found.insert(0, Finding("texts", True, about))
    return texts, found


def _files(
    receipt: Receipt, place: Place, found: list[Finding], left_out: Collection[str]
) -> tuple[dict[str, Path], list[Finding]]:
    """Our GGUFs that are as the receipt says and can be opened; what of the others."""
    ours = _ours(receipt)
    changed = {finding.name for finding in found if finding.passed is False}
    files: dict[str, Path] = {}
    of_files = []
    for name in sorted(ours):
        names = _parts(receipt, name)
        if names[0] in left_out:
            continue
        if not changed.isdisjoint((name, *names)) or set(names) - receipt.files.keys():
            of_files.append(Finding(f"{name}, KL", None, "not measured: it is not the file"))
            continue
        try:
            check_sound(GgufFile(place.path(names[0])))
        except QuantkitError as error:
            of_files.append(Finding(f"{name}, KL", None, error.message.rstrip(".")))
            continue
        files[name] = place.path(names[0])
    if not ours:
        of_files.append(Finding("measurements", None, "the receipt has none of a file of ours"))
    return files, of_files


def _measured(
    receipt: Receipt,
    files: Mapping[str, Path],
    texts: Mapping[str, str],
    drawn: Drawn,
    asked: Asked,
    folder: Path,
    echo: Callable[[Event], None],
    note: Callable[[str], None],
) -> list[Finding]:
    if not files or drawn.is_empty:
        return []
    from quantkit.evidence import devices
    from quantkit.verifying.again import Again
    from quantkit.verifying.again_in_use import AgainInUse

    base = find_base(receipt, asked.base, folder / "base", echo)
    if base.path is None:
        return [base.finding]
    device = devices.choose(asked.device, GgufFile(base.path))
    again = Again(receipt, files, texts, device, folder, note, asked.items)
    in_use = AgainInUse(receipt, files, device, folder, note)
    return [
        base.finding,
        *again.check_tokens(),
        *again.measure(base.path, drawn),
        *in_use.talks(base.path, drawn.talks),
        *in_use.answers(base.path, drawn.prompts),
    ]


def _notes(receipt: Receipt) -> tuple[str, ...]:
    engine = receipt.engine
    said = (
        f"Claimed of llama-cpp-python {engine.llama_cpp_python} (ggml {engine.ggml}) on"
        f" {engine.device}, {engine.n_threads} threads."
    )
    return (said,)
