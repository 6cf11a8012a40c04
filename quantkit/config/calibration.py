"""The spec of `--calibration`: `name[:weight],...`, and the names that it may use.

A name is a text (of the Hub, of this machine, written by the model, the path of a file) or a mix of
texts, whose parts share its weight. `auto` stands alone: the mix `hub` when the Hub answers and
`builtin` when not. A comma in a path is written `\\,`; `absolute` does that. Only the spelling is
looked at here, so that a wrong one is refused at once; `quantkit.calibration.files` and `sources`
read the texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.config.languages import LANGUAGES
from quantkit.errors import UsageError, check_writable_name


@dataclass(frozen=True)
class HubText:
    """A dataset on the Hub and the column that holds its text (or a list of chat messages). Without
    a `license` of its own its texts have many, and are not handed on.
    """

    repo: str
    config: str | None
    split: str
    column: str
    license: str | None


_ODC = "ODC-By 1.0"
HUB_TEXTS = {
    "fineweb-edu": HubText("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text", _ODC),
    "c4": HubText("allenai/c4", "en", "train", "text", _ODC),
    "wikitext2": HubText(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", "CC BY-SA 3.0"
    ),
    "code-hub": HubText("bigcode/the-stack-smol-xs", "python", "train", "content", None),
    "chat": HubText("HuggingFaceH4/ultrachat_200k", "default", "train_sft", "messages", "MIT"),
} | {
    f"lang-{code}": HubText("HuggingFaceFW/fineweb-2", language.config, "train", "text", _ODC)
    for code, language in LANGUAGES.items()
}
WRITTEN = ("prose", "dialogue", *(f"prose-{code}" for code in LANGUAGES))  # by the model itself
BUILTIN_TEXTS = ("docs", "code", *WRITTEN)
AUTO = "auto"
# By these a relative name is known as a file's; one that is there may have any.
SUFFIXES = (".txt", ".raw", ".md", ".json", ".jsonl", ".ndjson", ".parquet")

# The weights of a mix's parts. Languages that the model does not know leave theirs to the rest.
MIXES: dict[str, dict[str, float]] = {
    "hub": {"fineweb-edu": 7, "c4": 3, "code": 4, "chat": 4, "prose": 2, "languages": 3},
    "builtin": {"english": 20, "prose-languages": 3},
    "english": {"docs": 6, "code": 6, "prose": 5, "dialogue": 3},
    "languages": {f"lang-{code}": 1 for code in LANGUAGES},
    "prose-languages": {f"prose-{code}": 1 for code in LANGUAGES},
}


@dataclass(frozen=True)
class Request:
    """One text of a calibration spec. `if_known`: left out where the model does not know its
    language; so are the parts of mixes, while a text that is asked for by name is used.
    """

    name: str
    weight: float
    if_known: bool = False

    @property
    def language(self) -> str | None:
        """The code of the text's language; None for English and code."""
        return language_of(self.name)

    @property
    def is_file(self) -> bool:
        return _is_path(self.name)


def language_of(name: str) -> str | None:
    """Return the code of the language of a text with this name; None for English and code."""
    kind, _, code = name.partition("-")
    return code if kind in ("lang", "prose") and code in LANGUAGES else None


def license_of(name: str) -> str | None:
    """Return the license by which a text of this name may be published beside what was measured on
    it; None where it may not. A user's own files have no such name, and are never published.
    """
    if name in HUB_TEXTS:
        return HUB_TEXTS[name].license
    return "written by the model itself" if name in WRITTEN else _OF_CPYTHON.get(name)


_OF_CPYTHON = dict.fromkeys(("docs", "code"), "PSF-2.0")


def parts_of(mix: str, weight: float = 1.0) -> Iterator[Request]:
    """Yield the texts of a mix and of the mixes in it, with their shares of `weight`."""
    total = sum(MIXES[mix].values())
    for name, own in MIXES[mix].items():
        share = own / total
        if name in MIXES:
            yield from parts_of(name, weight * share)
        else:
            yield Request(name, weight * share, if_known=language_of(name) is not None)


def _is_path(name: str) -> bool:
    return "/" in name or Path(name).suffix.lower() in SUFFIXES


def _entries(spec: str) -> list[str]:
    """The parts between commas, those in names left alone."""
    return [entry.strip() for entry in re.split(r"(?<!\\),", spec) if entry.strip()]


def _unescaped(name: str) -> str:
    return name.replace("\\,", ",")


def _named(entry: str) -> tuple[str, str]:
    """Name and weight; no weight where what looks like one is the end of a file's name."""
    name, _, weight = entry.rpartition(":")
    try:
        float(weight)
    except ValueError:
        return entry, ""
    return (name, weight) if name else (entry, "")


def _is_known(name: str) -> bool:
    return name in (AUTO, *MIXES, *BUILTIN_TEXTS, *HUB_TEXTS)


def _file(entry: str) -> tuple[Path, str] | None:
    """The file that an entry names, and its weight; None when there is none."""
    for name, weight in ((entry, ""), _named(entry)):
        path = Path(_unescaped(name)).expanduser()
        if name and path.is_file():
            return path.absolute(), weight
    return None


def absolute(spec: str) -> str:
    """Return the spec with absolute paths, so that a run can be resumed from anywhere, and commas
    in them escaped. Raises UsageError for a missing file.
    """
    return ",".join(map(_absolute, _joined(spec)))


def _joined(spec: str) -> list[str]:
    """The entries; where they are not all there, a comma may belong to the name of a file."""
    entries = _entries(spec)
    if all(_is_known(_named(entry)[0]) or _file(entry) for entry in entries):
        return entries
    left, joined = spec.split(","), []
    while left:
        wholes = [",".join(left[:n]).strip() for n in range(len(left), 0, -1)]
        whole = next((entry for entry in wholes if entry and _file(entry)), wholes[-1])
        joined += [whole] if whole else []
        left = left[len(left) - wholes.index(whole) :]
    return joined


def _absolute(entry: str) -> str:
    name, weight = _named(entry)
    found = None if _is_known(name) else _file(entry)
    if found is None:
        if not _is_known(name) and _is_path(name):
            raise UsageError(f"There is no calibration text {name}.", "Check the path.")
        return entry
    check_writable_name(str(found[0]))
    path, weight = str(found[0]).replace(",", "\\,"), found[1]
    # What looks like a weight at the end of a name is none beside a weight.
    return f"{path}:{weight or 1}" if weight or _named(path)[1] else path


def shown(spec: str) -> str:
    """Return the spec without folders: it is published, and folders are private."""
    return ",".join(entry.rpartition("/")[2] for entry in _entries(spec))


def parse_spec(spec: str) -> tuple[Request, ...]:
    """Parse 'docs:2,notes.txt' into requests; weights default to 1. Raises UsageError for unknown
    names and weights, and for `auto` with others.
    """
    requests: list[Request] = []
    for entry in _entries(spec):
        name, weight_text = _named(entry)
        name, weight = _unescaped(name), float(weight_text or 1)
        if not 0 < weight < 1e6:
            raise UsageError(
                f"The weight in {entry!r} is not a positive number.",
                "Write name:weight, such as docs:2.",
            )
        if name in MIXES:
            requests += parts_of(name, weight)
        elif _is_known(name) or _is_path(name):
            requests.append(Request(name, weight))
        else:
            names = (AUTO, *MIXES, *BUILTIN_TEXTS, *HUB_TEXTS)
            known = ", ".join(n for n in names if language_of(n) is None)
            raise UsageError(
                f"There is no calibration text {name!r}.",
                f"Use {known}, prose-CODE or lang-CODE with one of {' '.join(LANGUAGES)}, or the"
                " path of a text file.",
            )
    if not requests:
        raise UsageError(
            "The calibration spec is empty.",
            "Use auto, builtin or a list such as docs:2,notes.txt.",
        )
    if len(requests) > 1 and AUTO in (request.name for request in requests):
        raise UsageError(
            f"{AUTO} cannot be combined with other texts: it chooses the whole mix.",
            "Use auto by itself, or name the texts, such as builtin,notes.txt.",
        )
    return tuple(requests)
