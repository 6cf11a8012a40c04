"""Turn a filled-in form into a `RunConfig`. Everything that a stranger types is checked here,
before any file or process is made from it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from quantkit import hub
from quantkit.config import PREFERENCES, PROFILES, RunConfig, compile_pattern
from quantkit.config.calibration import AUTO, BUILTIN_TEXTS, HUB_TEXTS, MIXES
from quantkit.config.devices import DEVICES
from quantkit.config.targets import (
    FAMILY,
    MOST_CONTEXT,
    BitsPerWeight,
    FileSize,
    FitsMemory,
    LikeMix,
    Target,
)
from quantkit.errors import UsageError
from quantkit.server.executors.registry import HERE
from quantkit.tensors import METHODS

SIZE_KINDS = ("like", "fits", "size", "bpw", "family")
FAMILIES = {
    "everyday": ("Q3_K_M", "Q4_K_M", "Q5_K_M"),
    "whole": FAMILY,
}
# Who may see a published repository: those who see the model, only its owner, everyone.
VISIBILITIES = ("model", "private", "public")
CALIBRATION_TEXTS = (AUTO, *MIXES, *BUILTIN_TEXTS, *HUB_TEXTS)

_MAX_TYPES_TEXT = 10_000
_MAX_TYPES = 100
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", re.ASCII)
_LISTED = re.compile(
    r"https?://\S+|demo:\S+|[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}(?:@\S+)?", re.ASCII
)
_MOST_MODELS = 10
_MOST_TITLE = 59  # characters of a collection's, on the Hub
_MACHINE = re.compile(r"[a-z0-9][a-z0-9_:-]{0,79}", re.ASCII)
# A repeated group, a row of optional characters or of groups with alternatives can take exponential
# time on the right name. A few repeats of single characters, or a few groups, cannot.
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_REPEATS = re.compile(r"(?<![\\(])[*+{?]")
_MAX_REPEATS, _MAX_GROUPS, _MAX_ALTERNATIVES = 3, 3, 12


@dataclass(frozen=True)
class RunForm:
    """The fields of the form, as text where they are text. Also the arguments of the API."""

    model: str = ""
    size_kind: str = "like"
    like: str = "Q4_K_M"
    size: str = ""
    bpw: float | str | None = None
    memory: str = ""  # with `context`: what else a file has to fit in
    context: int | float = 8192  # tokens
    family: tuple[str, ...] = ()  # stock mixes whose sizes are all made
    devices: tuple[str, ...] = ()  # names of `DEVICES`, each to be fitted with `context`
    profile: str = "standard"
    revision: str = ""
    levels: tuple[str, ...] = ()
    prefer: str = "quality"  # one of PREFERENCES
    equalize: bool = False
    methods: tuple[str, ...] = METHODS
    calibration: str = "auto"
    types: str = ""
    seed: int | float | None = 0
    device: str = "cpu"
    publish: str = ""
    visibility: str = "model"  # one of VISIBILITIES
    compare: str = ""  # as `runs.compared` takes it
    own_text: str = ""  # what `runs.texts` calls a text that was sent
    machine: str = HERE  # as `registry.asked` takes it


def models_of(text: Any) -> tuple[str, ...]:
    """Return the models that a field names: several ids or addresses, one a line or with commas
    between them, or whatever else it holds as one. Raises UsageError for very many.
    """
    whole = _text(text, "model", 2000)
    parts = _parts(r"[\s,;]+", whole)
    if not parts or not all(map(_LISTED.fullmatch, parts)):
        parts = _parts(r"[\n,;]+", whole)  # what is none is refused by itself
        if not any(map(_LISTED.fullmatch, parts)):
            return (text,)
    if len(parts) > _MOST_MODELS:
        raise UsageError(
            f"{len(parts)} models are too many at once.", f"Name at most {_MOST_MODELS}."
        )
    return parts


def _parts(separator: str, text: str) -> tuple[str, ...]:
    """What stands between separators, each once."""
    return tuple(dict.fromkeys(p for part in re.split(separator, text) if (p := part.strip())))


def to_config(form: RunForm, public: bool) -> RunConfig:
    """Return the run that the form asks for.

    Raises UsageError with what to write instead.
    """
    visibility = check_visibility(form.visibility)
    revision = _text(form.revision, "revision", 200) or None
    model = hub.parse_reference(_text(form.model, "model", 500), revision, allow_local=not public)
    return RunConfig(
        model=model.id,
        revision=model.revision,
        targets=_targets(form),
        profile=_one_of(form.profile, "profile", tuple(PROFILES)),
        levels=_names(form.levels, "level") or None,
        prefer=_one_of(form.prefer, "preference", PREFERENCES),
        equalize=bool(form.equalize),
        methods=_methods(form.methods),
        types=_types(_text(form.types, "type map", _MAX_TYPES_TEXT)),
        calibration=_calibration(_text(form.calibration, "calibration", 300)),
        seed=_seed(form.seed),
        device=_one_of(form.device, "device", ("cpu", "cuda")),
        publish=check_repo(form.publish) if form.publish else None,
        private=visibility == "private",
        public=visibility == "public",
    )


def check_visibility(word: Any) -> str:
    """Return one of VISIBILITIES. Raises UsageError."""
    return _one_of(word, "visibility", VISIBILITIES)


def check_machine(name: Any) -> str:
    """Return the name of a machine. Raises UsageError if it cannot be one."""
    if not isinstance(name, str) or not _MACHINE.fullmatch(name):
        raise UsageError("That is not the name of a machine.", "Use here or auto.")
    return name


def check_collection(name: Any) -> str | None:
    """Return a collection as its URL names it, or a title; None for none. Raises UsageError."""
    text = _text(name, "collection", 300).removeprefix("https://huggingface.co/collections/")
    if not text:
        return None
    is_title = "/" not in text and len(text) <= _MOST_TITLE and text.isprintable()
    if not is_title and (not _REPO.fullmatch(text) or ".." in text):
        raise UsageError(
            f"{text[:80]!r} is not a collection.",
            "Write the last part of its URL, such as you/my-models-65f1c3, or a title of at most"
            f" {_MOST_TITLE} characters.",
        )
    return text


def check_repo(repo: str) -> str:
    """Return a repository to publish to. Raises UsageError if it is not owner/name."""
    repo = _text(repo, "repository", 200)
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".")):
        raise UsageError(
            f"{repo!r} is not a repository to publish to.",
            "Write owner/name, such as you/my-model.",
        )
    return repo


def _text(value: Any, what: str, n_max: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"The {what} is not text.", "Write it as text.")
    if len(value) > n_max:
        raise UsageError(f"The {what} is longer than {n_max} characters.", "Write a shorter one.")
    return value.strip()


def _one_of(value: Any, what: str, known: tuple[str, ...]) -> str:
    if value not in known:
        shown = str(value)[:60]
        raise UsageError(f"There is no {what} {shown!r}.", "Use one of " + ", ".join(known) + ".")
    return str(value)


def _names(values: Any, what: str) -> tuple[str, ...]:
    if not values:
        return ()
    if not isinstance(values, (list, tuple)) or len(values) > 40:
        raise UsageError(f"That is not a list of {what}s.", "Choose some from the list.")
    return tuple(_text(value, what, 20) for value in values)


def _methods(values: Any) -> tuple[str, ...]:
    chosen = _names(values, "method")
    for method in chosen:
        _one_of(method, "method", METHODS)
    return tuple(method for method in METHODS if method in chosen) or METHODS


def _targets(form: RunForm) -> tuple[Target, ...]:
    kind = _one_of(form.size_kind, "kind of size", SIZE_KINDS)
    if kind == "family":
        mixes = _names(form.family, "stock mix")
        if not mixes:
            raise UsageError("Choose at least one size.", "Tick the sizes that you want.")
        return tuple(LikeMix(mix) for mix in mixes)
    if kind == "fits":
        return tuple(FitsMemory(value) for value in _fits(form))
    if kind == "like":
        return (LikeMix(_text(form.like, "stock mix", 20)),)
    if kind == "size":
        size = _text(form.size, "file size", 30)
        if not size:
            raise UsageError("Enter a file size.", "Write 90MB or 5.5GB, for example.")
        return (FileSize(size),)
    if form.bpw in (None, ""):
        raise UsageError("Enter the bits per weight.", "Write a number such as 4.5.")
    return (BitsPerWeight(str(form.bpw)[:20]),)


def _fits(form: RunForm) -> list[str]:
    """Memories and the context as targets have them. Raises UsageError."""
    memory, tokens = _text(form.memory, "memory", 30), form.context
    memories = [_one_of(name, "device", tuple(DEVICES)) for name in _names(form.devices, "device")]
    memories += [memory] if memory else []
    if not memories:
        raise UsageError(
            "Choose what the file has to fit.", "Pick a device, or write its memory, such as 7GB."
        )
    if "@" in memory:
        raise UsageError(
            f"{memory!r} is not a size of memory alone.",
            "Write it as 7GB: the context has a field of its own.",
        )
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or tokens != int(tokens):
        raise UsageError("The context is not a number of tokens.", "Write one such as 8192.")
    if not 1 <= tokens <= MOST_CONTEXT:
        raise UsageError(
            f"A context of {tokens:,} tokens is not possible.", "Enter a context such as 8192."
        )
    return [f"{memory}@{int(tokens)}" for memory in memories]


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise UsageError("The seed is not a number.", "Write a whole number such as 0.")
    number = 0.0 if value is None else float(value)
    if not math.isfinite(number) or number != int(number) or not 0 <= number < 2**31:
        raise UsageError("That is not a seed.", "Write a whole number from 0 to 2147483647.")
    return int(number)


def _calibration(spec: str) -> str:
    """Names and weights only: paths of files are for the command line."""
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        name, _, weight = entry.partition(":")
        _one_of(name, "calibration text", CALIBRATION_TEXTS)
        if weight and not re.fullmatch(r"\d{1,4}(\.\d{1,4})?", weight, re.ASCII):
            raise UsageError(
                f"The weight in {entry[:60]!r} is not a number.", "Write name:weight, as docs:2."
            )
    return spec or "auto"


def _types(text: str) -> tuple[tuple[str, str], ...]:
    if not text:
        return ()
    remedy = 'Write {"default": "Q4_K", "ffn_down": "Q6_K"}.'
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError("The type map is not JSON.", remedy) from None
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise UsageError("The type map is not an object of strings.", remedy)
    if len(value) > _MAX_TYPES:
        raise UsageError(f"The type map has more than {_MAX_TYPES} entries.", "Write fewer.")
    for pattern in value:
        check_pattern(pattern)
    return tuple(value.items())


def check_pattern(pattern: str) -> None:
    """Raise UsageError for a regex that is wrong or may take forever."""
    compile_pattern(pattern)
    looks_around = re.search(r"\\[1-9]|\(\?(?!:)", pattern)
    n_groups = pattern.count("(")
    n_repeats = len(_REPEATS.findall(pattern)) + (n_groups > 0)
    if (
        _REPEATED_GROUP.search(pattern)
        or looks_around
        or n_repeats > _MAX_REPEATS
        or n_groups > _MAX_GROUPS
        or pattern.count("|") > _MAX_ALTERNATIVES
    ):
        raise UsageError(
            f"The pattern {pattern[:60]!r} could take too long to match.",
            "Use at most three * or + and three groups, none of them repeated, no look-around and"
            " no back-reference.",
        )
