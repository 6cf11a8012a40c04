"""The languages of the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Language:
    """A language's name and its part of the fineweb-2 data set."""

    name: str
    config: str


LANGUAGES = {
    "ar": Language("Arabic", "arb_Arab"),
    "de": Language("German", "deu_Latn"),
    "es": Language("Spanish", "spa_Latn"),
    "fr": Language("French", "fra_Latn"),
    "hi": Language("Hindi", "hin_Deva"),
    "ja": Language("Japanese", "jpn_Jpan"),
    "ko": Language("Korean", "kor_Hang"),
    "ru": Language("Russian", "rus_Cyrl"),
    "th": Language("Thai", "tha_Thai"),
    "zh": Language("Chinese", "cmn_Hani"),
}


@cache
def sentences(code: str) -> tuple[str, ...]:
    """Return the sentences of data/languages.txt in a language, `en` too: the same ones in all."""
    path = Path(__file__).parent.parent / "data" / "languages.txt"
    rows = [line.split("\t", 1) for line in path.read_text("utf-8").splitlines() if "\t" in line]
    return tuple(text for language, text in rows if language == code)
