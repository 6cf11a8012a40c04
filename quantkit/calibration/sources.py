"""Where calibration text comes from: the names of a spec (`quantkit.config.calibration`) to
documents, from CPython itself and datasets on the Hub. `quantkit.calibration.files` reads files.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.calibration.documents import Domain, up_to
from quantkit.config.calibration import HUB_TEXTS, license_of
from quantkit.errors import QuantkitError


def python_docs(limit: int) -> Iterator[str]:
    """Yield the topics of the language reference that ship with CPython (pydoc_data): English
    technical prose.
    """
    from pydoc_data.topics import topics

    return up_to(limit, (text for _, text in sorted(topics.items())))


def python_code(limit: int) -> Iterator[str]:
    """Yield modules of the standard library, every file a document, largest packages not
    favored.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        p for p in root.glob("**/*.py") if not _SKIPPED.intersection(p.relative_to(root).parts)
    )
    step = 7919  # a prime: walks all files in an order that mixes packages
    order = (paths[i * step % len(paths)] for i in range(len(paths)))
    texts = (path.read_text("utf-8", "replace") for path in order)
    return up_to(limit, (text[:20_000] for text in texts if len(text) > 500))


_SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def hub_text(
    name: str, limit: int, token: str | None, render_chat: Callable[[list[dict[str, str]]], str]
) -> Iterator[str]:
    """Yield documents streamed from a dataset on the Hub. Raises QuantkitError when it does not
    answer.
    """
    import datasets

    source = HUB_TEXTS[name]

    def rendered(messages: list[dict[str, str]]) -> str:
        try:
            return render_chat(messages)
        except Exception as error:  # templates raise whatever they like
            raise QuantkitError(
                f"The model's chat template fails on a dialogue of {source.repo}: {error}",
                "Leave dialogues out, such as --calibration fineweb-edu,c4,code.",
            ) from error

    try:
        rows = datasets.load_dataset(
            source.repo, source.config, split=source.split, streaming=True, token=token
        )
        values = (row[source.column] for row in rows)
        yield from up_to(limit, (v if isinstance(v, str) else rendered(v) for v in values if v))
    except QuantkitError:
        raise
    except Exception as error:  # datasets raises many kinds for one thing: the data did not come
        raise QuantkitError(
            f"The dataset {source.repo} cannot be read from the Hub: {str(error).splitlines()[0]}",
            "Check the network, or use --calibration builtin.",
        ) from error


def domain(name: str, source: str, documents: Iterable[str]) -> Domain:
    """Make a Domain of a text of `quantkit.config.calibration`, without empty documents and NUL
    bytes.
    """
    kept = (text.replace("\0", "").strip() for text in documents)
    return Domain(name, source, tuple(text for text in kept if len(text) >= 50), license_of(name))


def builtin_text(name: str, limit: int) -> Domain | None:
    """Return the parts of the built-in mix that need no model; None for the others."""
    if name not in _BUILTIN:
        return None
    what, read = _BUILTIN[name]
    return domain(name, f"{what} of CPython {platform.python_version()}", read(limit))


_BUILTIN = {"docs": ("documentation", python_docs), "code": ("standard library", python_code)}


@dataclass(frozen=True)
class Described:
    """What the report says about a domain of the calibration text. `held_out` is the name of the
    text to validate on that is held out of it, if it is long enough.
    """

    name: str
    source: str
    weight: float
    n_documents: int
    n_characters: int
    sha256: str
    license: str | None = None
    held_out: str | None = None

    @classmethod
    def of(cls, d: Domain, weight: float, held_out: str | None) -> Described:
        n_characters = sum(map(len, d.documents))
        return cls(
            d.name,
            d.source,
            round(weight, 4),
            len(d.documents),
            n_characters,
            d.sha256,
            d.license,
            held_out,
        )
