"""Where calibration text comes from: the names of a spec (`quantkit.config.calibration`) to
documents, from CPython itself and datasets on the Hub. `quantkit.calibration.files` reads files.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from quantkit.calibration.documents import Domain
from quantkit.config.calibration import HUB_TEXTS
from quantkit.errors import QuantkitError


def python_docs(limit: int) -> Iterator[str]:
    """Yield the topics of the language reference that ship with CPython (pydoc_data): English
    technical prose.
    """
    from pydoc_data.topics import topics

    return _up_to(limit, (text for _, text in sorted(topics.items())))


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
    return _up_to(limit, (text[:20_000] for text in texts if len(text) > 500))


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


def _up_to(limit: int, texts: Iterable[str]) -> Iterator[str]:
    """Texts until they hold `limit` characters."""
    n = 0
    for text in texts:
        yield text
        n += len(text)
        if n >= limit:
            return


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
        yield from _up_to(limit, (v if isinstance(v, str) else rendered(v) for v in values if v))
    except QuantkitError:
        raise
    except Exception as error:  # datasets raises many kinds for one thing: the data did not come
        raise QuantkitError(
            f"The dataset {source.repo} cannot be read from the Hub: {str(error).splitlines()[0]}",
            "Check the network, or use --calibration builtin.",
        ) from error


def hub_answers(token: str | None) -> str | None:
    """Return None when the Hub answers, else the reason why not."""
    from quantkit import hub

    return hub.why_offline(token)


def domain(name: str, source: str, documents: Iterable[str]) -> Domain:
    """Make a Domain of documents, without empty ones and NUL bytes."""
    kept = (text.replace("\0", "").strip() for text in documents)
    return Domain(name, source, tuple(text for text in kept if len(text) >= 50))


def builtin_text(name: str, limit: int) -> Domain | None:
    """Return the parts of the built-in mix that need no model; None for the others."""
    import platform

    if name == "docs":
        return domain(
            name, f"documentation of CPython {platform.python_version()}", python_docs(limit)
        )
    if name == "code":
        return domain(
            name, f"standard library of CPython {platform.python_version()}", python_code(limit)
        )
    return None


def describe(domains: Iterable[tuple[Domain, float]]) -> list[dict[str, Any]]:
    """Return what the report says about the calibration text."""
    return [
        {
            "name": d.name,
            "source": d.source,
            "weight": round(weight, 4),
            "n_documents": len(d.documents),
            "n_characters": sum(map(len, d.documents)),
            "sha256": d.sha256,
        }
        for d, weight in domains
    ]
