"""Read the text to measure on: local files, and three data sets of the Hub by name.

A file is read as UTF-8 with its newlines as they are, so that its sha256 is that of the file. For
the data sets:

- `wikitext2`: WikiText-2 raw, test. For the llama.cpp protocol the rows are put back into the
  published `wiki.test.raw`; for gptq they are joined with blank lines, as in the papers.
- `c4`: the first 1,100 documents of the English validation set (the papers' number), blank lines
  between.
- `fineweb-edu`: the first 1,000 documents of the last shard of sample-10BT, blank lines between.
  It has no validation split; calibration reads from the first shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError

DATASETS = ("wikitext2", "c4", "fineweb-edu")


def text_sha256(text: str) -> str:
    """Return the hex sha256 of the text's UTF-8 bytes: equal to the file's."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_text(path: Path) -> str:
    """Return a file's text, byte for byte. Raises EvaluationError when it is missing or not
    UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise EvaluationError(
            f"The text {path} cannot be read: {error.strerror}.", "Check the path."
        ) from None
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"The text {path} is not UTF-8 (byte {error.start}).", "Convert it to UTF-8 first."
        ) from None


def load_dataset_rows(
    path: str,
    name: str | None,
    split: str,
    data_files: str | None = None,
    streaming: bool = False,
) -> Iterator[dict[str, Any]]:
    """Return the rows of a Hub data set. Raises EvaluationError when the Hub does not give it, or
    stops giving.
    """
    try:
        import datasets  # slow to import, and needed by nothing else here
    except ImportError:
        raise EvaluationError(
            "Data sets by name need the package `datasets`.",
            "Install it with `pip install datasets`, or give a local file.",
        ) from None
    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(
            path,
            name,
            split=split,
            data_files={split: data_files} if data_files else None,
            streaming=streaming,
        )
    # `datasets` raises whatever its transport raised: a dozen types from four packages
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EvaluationError(
            f"The data set {path} cannot be loaded from the Hub ({reason}).",
            "Check the network and HF_HUB_OFFLINE, or give a local file.",
        ) from error


def load_dataset_text(name: str, protocol: str) -> str:
    """Return one of `DATASETS` as text for a protocol; see the module for how documents are
    joined.
    """
    if name == "wikitext2":
        rows = load_dataset_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        documents = [row["text"] for row in rows]
        if protocol == "gptq":
            return "\n\n".join(documents)
        return "".join(row or " \n" for row in documents)  # blank lines became empty rows
    if name == "c4":
        rows = load_dataset_rows(
            "allenai/c4",
            None,
            "validation",
            data_files="en/c4-validation.00000-of-00008.json.gz",
            streaming=True,
        )
        return "\n\n".join(row["text"] for row in islice(rows, 1100))
    if name == "fineweb-edu":
        rows = load_dataset_rows(
            "HuggingFaceFW/fineweb-edu",
            None,
            "train",
            data_files="sample/10BT/013_00000.parquet",
            streaming=True,
        )
        return "\n\n".join(row["text"] for row in islice(rows, 1000))
    raise EvaluationError(f"There is no data set {name!r}.", f"Use one of {', '.join(DATASETS)}.")
