"""Read calibration text from local files of any layout, Unicode encoding and length. Whatever is
not used as it is in the file is reported.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import sandbox
from quantkit.calibration.documents import up_to
from quantkit.config.calibration import parse_spec
from quantkit.errors import QuantkitError

PIECE = 2000  # characters of a document that is cut out of a longer text
LITTLE = 20_000  # characters: with fewer there may be too few windows of tokens
_LEAST = 50  # characters: shorter documents are joined
_FEWEST = 3  # documents: one to calibrate on, one to judge by, one to validate on
_LOOKED_AT = 1_000_000  # characters, before the work
_MOST_BYTES = 4  # of a character
_PARAGRAPHS = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)*\n")
_NOT_TEXT = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\N{REPLACEMENT CHARACTER}]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_MOST_DAMAGED = 0.1  # share of characters: what has more of them is no text
_BOMS = (  # the longer ones first: one is the beginning of another
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_COLUMNS = ("text", "content")
_REMEDY = (
    'Use UTF-8 text, JSON lines of strings or of objects with a "text", or parquet with a column'
    ' "text".'
)
_MOST_EMPTY = 100_000  # rows without text, before it is taken that there is none
_LIMITS = sandbox.Limits(cpu_seconds=120, wall_seconds=300, memory_bytes=3 * 2**30)


@dataclass(frozen=True)
class LocalText:
    """A file's documents, and clauses on what differs from the file."""

    documents: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def n_characters(self) -> int:
        return sum(map(len, self.documents))


def read(path: Path, limit: int) -> LocalText:
    """Return the documents of about the first `limit` characters. Raises QuantkitError for a file
    that is missing, is not text or holds none.
    """
    if not path.is_file():
        raise QuantkitError(
            f"There is no calibration file {path}.", "Check the path given to --calibration."
        )
    kind = path.suffix.lower()
    remarks: list[str] = []
    try:
        if kind == ".parquet":
            texts = up_to(limit, _parquet(path, limit))
        elif kind in (".jsonl", ".ndjson", ".json"):
            texts = up_to(limit, _json_texts(_decoded(path, limit, remarks), kind == ".json"))
        else:
            texts = _pieces(_decoded(path, limit, remarks), PIECE)
        found = _documents(texts, remarks)
    except OSError as error:
        raise _unreadable(path, str(error.strerror or error)) from None
    except ValueError as error:
        raise _unreadable(path, str(error)) from None
    if not found:
        raise QuantkitError(f"The calibration file {path} holds no text.", "Give another file.")
    return LocalText(tuple(found), tuple(dict.fromkeys(remarks)))


def look(spec: str) -> list[str]:
    """Open every file of a calibration spec: sentences on what is worth knowing before the work.

    Raises QuantkitError for what `read` would refuse.
    """
    said = []
    for request in parse_spec(spec):
        if request.is_file:
            path = Path(request.name)
            text = read(path, _LOOKED_AT)
            said += [f"{path.name}: {remark}" for remark in text.remarks]
            if text.n_characters < LITTLE:
                said.append(
                    f"{path.name} is short ({text.n_characters:,} characters): where it is too"
                    " little, CPython's documentation is added"
                )
    return said


def _unreadable(path: Path, reason: str) -> QuantkitError:
    return QuantkitError(f"The calibration file {path} cannot be read: {reason}.", _REMEDY)


def _decoded(path: Path, limit: int, remarks: list[str]) -> str:
    """The beginning of a file as text with plain line ends. Raises ValueError for what is none."""
    with path.open("rb") as file:
        data = file.read(limit * _MOST_BYTES)
        is_whole = not file.read(1)
    mark, encoding = next(((m, e) for m, e in _BOMS if data.startswith(m)), (b"", "utf-8"))
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    text = decoder.decode(data[len(mark) :], final=is_whole)
    n_damaged = len(_NOT_TEXT.findall(text))
    if n_damaged > _MOST_DAMAGED * len(text):
        raise ValueError("it is not text, or in an old encoding")
    if (n_bad := text.count("\N{REPLACEMENT CHARACTER}")) > 0:
        remarks.append(f"{n_bad:,} characters that are not {encoding.upper()} were replaced")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_texts(text: str, is_document: bool) -> Iterator[str | None]:
    """Of JSON lines, or of one list. Raises ValueError."""
    if is_document and text.lstrip().startswith("["):
        rows: Any = _loaded(text, "it")
    else:
        lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = (_loaded(line, f"line {i}") for i, line in lines)
    for i, row in enumerate(rows, 1):
        yield _text_of(row, f"item {i}")


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None


def _text_of(row: Any, where: str) -> str | None:
    if isinstance(row, dict):
        column = next((name for name in _COLUMNS if name in row), None)
        if column is None:
            raise ValueError(f'{where} has no "text"')
        row = row[column]
    if row is not None and not isinstance(row, str):
        raise ValueError(f"the text of {where} is not a string")
    return row


def _parquet(path: Path, limit: int) -> Iterator[str | None]:
    """Read apart: a file of a few bytes can become any number of rows."""
    arguments = {"path": str(path.absolute()), "limit": limit}
    function = f"{__name__}:parquet_texts"
    try:
        for part in sandbox.stream(
            function,
            arguments,
            limits=_LIMITS,
            readable=[path.absolute()],
            shape=list[str | None],
        ):
            yield from part
    except sandbox.Crashed as error:
        raise ValueError(f"the process that read it {error.reason}") from None
    except QuantkitError as error:
        raise ValueError(error.message) from None


def parquet_texts(path: str, limit: int) -> Iterator[list[str | None]]:
    """Yield the texts of a file, some at a time, until they hold `limit` characters."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
        column = next((name for name in _COLUMNS if name in file.schema_arrow.names), None)
        if column is None:
            raise QuantkitError('it has no column "text"')
        n = n_empty = 0
        for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
            texts = [_text_of(value, f'column "{column}"') for value in batch.column(0).to_pylist()]
            yield [text and text[: limit + 1] for text in texts]
            n += sum(len(text or "") for text in texts)
            n_empty += sum(not text for text in texts)
            if n >= limit or n_empty >= _MOST_EMPTY:
                return
    except MemoryError:
        raise QuantkitError("it takes too much memory") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        raise QuantkitError(str(error).split("\n")[0].rstrip(".")) from None


def _documents(texts: Iterable[str], remarks: list[str]) -> list[str]:
    """Texts that can be dealt out: short ones joined, few ones cut."""
    found: list[str] = []
    waiting = ""
    for text in texts:
        clean = _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text.replace("\0", "")).strip()
        waiting = f"{waiting}\n\n{clean}" if waiting and clean else waiting or clean
        if len(waiting) >= _LEAST:
            found.append(waiting)
            waiting = ""
    if waiting:
        found[-1:] = ["\n\n".join([*found[-1:], waiting])]
    if found and len(set(found)) < _FEWEST:
        whole = "\n\n".join(found)
        found = list(_pieces(whole, min(PIECE, max(1, len(whole) // (2 * _FEWEST)))))
        remarks.append("it is one piece, and was cut anywhere")
    return found


def _pieces(text: str, size: int) -> Iterator[str]:
    """Documents of a few paragraphs, and of parts of long ones, so that there is something to deal
    out.
    """
    piece = ""
    for paragraph in _PARAGRAPHS.split(text):
        for part in _cut(paragraph.strip("\n"), size):
            piece += part + "\n\n"
            if len(piece) > size:
                yield piece.rstrip("\n")
                piece = ""
    if piece.strip():
        yield piece.rstrip("\n")


def _cut(text: str, size: int) -> Iterator[str]:
    """A long text at the ends of lines or words, or anywhere when it has none."""
    start = 0
    while len(text) - start > 2 * size:
        window = text[start + size // 2 : start + size + 1]
        at = max(window.rfind("\n"), 0) or max(window.rfind(" "), 0) or size - size // 2
        end = start + size // 2 + at
        yield text[start:end]
        start = end
    yield text[start:]
