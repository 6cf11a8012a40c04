"""Find the pre-tokenizer of llama.cpp that matches a tokenizer which the converter does not know.

A byte-level BPE tokenizer first cuts text into words by a regular expression. llama.cpp has these
built in under names (`tokenizer.ggml.pre`), and the converter finds the name by a hash of the token
ids of one test text. So a fine-tune that added a word to the vocabulary, or puts another token in
front, is unknown though it cuts as its base model does. Guessing from the base model's name could
be wrong without a sign. Instead every name is tried: llama.cpp itself tokenizes the probes below,
and only one whose ids equal the original's on all of them is taken. The result carries a warning
that says so, and one more where the special tokens around a text would differ.
"""

from __future__ import annotations

import re
from pathlib import Path

from quantkit.llamacpp.converter import sandbox

# Where pre-tokenizers differ: digits alone, in threes, in runs; contractions in both cases; letters
# next to marks; spaces, tabs and line ends in runs and at ends; punctuation runs; scripts.
PROBES = (
    "I've been told he's THERE'S we'LL, don't you'd; O'Neil's 'quoted' words'",
    "1 22 333 4444 55555 1234567890 3.14 1,000,000 v2.0b x86_64 0xFF 10:30 ½ ٣٤٥",
    "  two  spaces   three\ttab\t\ttabs\n\nlines\r\n \n  indented\n    more   \n trailing  ",
    "def f(x): return {'a': [x**2, ~x], \"b\": x!=3} # comment... //==-->>__init__;;;",
    '<p class="a">&amp; http://example.org/path?q=1&r=%20#top user@mail.com C:\\dir\\file.txt',
    "Straße naïve façade e\u0301te\u0301 ÅÉÎ ǅ ŉ İstanbul ſ ﬁne résumé-like œuvre",
    "Привет, мир! Ёлка №5. Ελληνικά ώς. Հայերեն. עִבְרִית שלום. العَرَبِيَّةُ جميلة.",
    "我想在apple工作1314151天。日本語のテキスト、カタカナ。한국어 문장입니다 ㅋㅋ",
    "हिन्दी में पाठ বাংলা தமிழ் ไทยภาษา ខ្មែរ ພາສາລາວ မြန်မာ",
    "🚀 (normal) 😶\u200d🌫️ 👩🏽‍💻 ✅✅ … — “quotes” ‘single’ €5 £6 ¥7 ∑∫√ ①②",
    "camelCaseWord snake_case_word UPPERlower HTMLParser iOS17 a1b2C3 A.B.C. e.g., U.S.A.'s",
    "!!!??? ...... ###### ''''''\"\"\"\"\" ```code``` ~~~ ^^^ $$$ %%% &&& *** ((())) [[]] {{}}",
    "a\u00a0b\u2003c\u3000d\u200be\ufeff \x00\x7f end",
)


def candidates(tree: Path) -> list[str]:
    """Return the names of pre-tokenizers that the converter can give, the common ones first."""
    text = (tree / "conversion" / "base.py").read_text(encoding="utf-8")
    names = set(re.findall(r'^\s+res = "([\w.-]+)"$', text, flags=re.MULTILINE))
    common = ["llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "deepseek-llm"]
    return [name for name in common if name in names] + sorted(names - set(common))


def find(tree: Path, skeleton: Path, said: sandbox.Said, log: Path) -> sandbox.Said | None:
    """Return the pre-tokenizer with which llama.cpp splits every probe as the original tokenizer
    does, or None. `skeleton` holds the vocabulary, `said` the original's tokens. Tries a name in a
    tenth of a second.
    """
    names = candidates(tree)
    outcome = sandbox.run(
        "match",
        tree,
        log,
        sandbox.limits_for(0, 0),
        readable=[skeleton],
        gguf=str(skeleton),
        candidates=names,
        probes=said.probes,
        plain=said.plain,
        special=said.special,
    )
    return outcome.said if outcome.ok and outcome.said.matching in names else None
