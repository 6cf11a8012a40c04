"""Hold every file against the bytes that the receipt says."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.evidence.receipt.schema import FileSum, Receipt
from quantkit.files import READERS
from quantkit.gguf_file import cut
from quantkit.gguf_file.read import GgufFile
from quantkit.sandbox import untrusted
from quantkit.verifying.findings import Finding
from quantkit.verifying.places import Place


def expected(receipt: Receipt, place: Place) -> dict[str, FileSum]:
    """Return the files of the receipt that the place has with so many bytes: no others are brought,
    whatever their size.
    """
    return {n: s for n, s in receipt.files.items() if place.sizes.get(n) == s.n_bytes}


def check_files(receipt: Receipt, place: Place, left_out: Collection[str] = ()) -> list[Finding]:
    """Return a finding for each file that is not as the receipt says, and one for all others; and
    one for each GGUF that the receipt does not know. Those `left_out` were not brought.
    """
    there = {name: s for name, s in expected(receipt, place).items() if name not in left_out}
    with ThreadPoolExecutor(READERS) as pool:
        paths = [place.path(name) for name in there]
        sums = dict(zip(there, pool.map(_sum, paths), strict=True))
    found = [
        Finding(name, False, _wrong(name, place.sizes, sums))
        for name, wanted in receipt.files.items()
        if sums.get(name) != wanted.sha256 and name not in left_out
    ]
    n_good = len(receipt.files) - len(found) - len(left_out)
    found += _check_joined(receipt, place, {*left_out, *(finding.name for finding in found)})
    if n_good:
        about = f"{n_good} of {len(receipt.files)} files have the bytes that the receipt says"
        found.insert(0, Finding("files", True, about))
    elif not receipt.files:
        found.append(Finding("files", None, "the receipt names none"))
    return found + [
        Finding(name, None, "the receipt does not know this file")
        for name in sorted(place.sizes)
        if name.endswith(".gguf") and name not in receipt.files
    ]


def _check_joined(receipt: Receipt, place: Place, bad: Collection[str]) -> list[Finding]:
    """Whether parts are together the file that was measured."""
    found = []
    for name, whole in receipt.joined.items():
        if set(bad) >= set(whole.parts):
            continue
        if not set(bad).isdisjoint(whole.parts):
            found.append(Finding(name, None, "a part of it is not as the receipt says"))
            continue
        about = f"its {len(whole.parts)} parts are together the file that the receipt says"
        try:
            is_it = cut.whole_sha256(GgufFile(place.path(whole.parts[0]))) == whole.sha256
        except QuantkitError as error:
            found.append(Finding(name, False, error.message.rstrip(".")))
            continue
        found.append(Finding(name, is_it, about if is_it else "its parts are another file"))
    return found


def _wrong(name: str, sizes: Mapping[str, int], sums: Mapping[str, str | None]) -> str:
    if name not in sizes:
        return "it is missing"
    if name not in sums:
        return f"it has {sizes[name]:,} bytes, and the receipt says another number"
    return "its bytes are not those of the receipt" if sums[name] else "it cannot be read"


def _sum(path: Path) -> str | None:
    """The sha256 of a plain file; None for anything else."""
    try:
        with untrusted.open_plain(path) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except (OSError, untrusted.Damaged):
        return None
