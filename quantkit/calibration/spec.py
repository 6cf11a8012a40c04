"""The spec of `--calibration`: `name[:weight],...`, and the names that it may use.

Names are domains of the Hub mix, `builtin` or its parts (docs, code, prose, dialogue), or the path
of a .txt, .jsonl or .parquet file. `auto` stands alone: the Hub mix when the Hub answers and
`builtin` when not. Only the spelling is looked at here, so that a wrong one is refused at once;
`quantkit.calibration.sources` reads the texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UsageError


@dataclass(frozen=True)
class HubText:
    """A dataset on the Hub and the column that holds its text (or a list of chat messages)."""

    repo: str
    config: str | None
    split: str
    column: str


HUB_TEXTS = {
    "fineweb-edu": HubText("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
    "c4": HubText("allenai/c4", "en", "train", "text"),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "code-hub": HubText("bigcode/the-stack-smol-xs", "python", "train", "content"),
    "languages": HubText("HuggingFaceFW/fineweb-2", "deu_Latn", "train", "text"),
    "chat": HubText("HuggingFaceH4/ultrachat_200k", "default", "train_sft", "messages"),
}
AUTO = "auto"
BUILTIN = {"docs": 0.3, "code": 0.3, "prose": 0.25, "dialogue": 0.15}
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_MIX = {"fineweb-edu": 0.35, "c4": 0.15, "code": 0.2, "chat": 0.2, "prose": 0.1}


@dataclass(frozen=True)
class Request:
    """One entry of a calibration spec."""

    name: str
    weight: float


def parse_spec(spec: str) -> tuple[Request, ...]:
    """'docs:2,notes.txt' -> requests; weights default to 1. Raises UsageError for unknown names and
    weights, and for `auto` beside others.
    """
    requests: list[Request] = []
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        name, colon, weight_text = entry.rpartition(":")
        if not colon:
            name, weight_text = entry, "1"
        try:
            weight = float(weight_text)
        except ValueError:
            name, weight = entry, 1.0
        if not 0 < weight < 1e6:
            raise UsageError(
                f"The weight in {entry!r} is not a positive number.",
                "Write name:weight, such as docs:2.",
            )
        if name == "builtin":
            requests += [Request(part, weight * share) for part, share in BUILTIN.items()]
        elif name in (AUTO, *BUILTIN, *HUB_TEXTS) or Path(name).suffix in SUFFIXES:
            requests.append(Request(name, weight))
        else:
            known = ", ".join((AUTO, "builtin", *BUILTIN, *HUB_TEXTS))
            raise UsageError(
                f"There is no calibration text {name!r}.",
                f"Use {known}, or the path of a .txt, .jsonl or .parquet file.",
            )
    if not requests:
        raise UsageError(
            "The calibration spec is empty.",
            "Use auto, builtin or a list such as docs:2,notes.txt.",
        )
    if len(requests) > 1 and AUTO in (request.name for request in requests):
        raise UsageError(
            f"{AUTO} stands alone in a calibration spec: it chooses the whole mix.",
            "Use auto by itself, or name the texts, such as builtin,notes.txt.",
        )
    return tuple(requests)
