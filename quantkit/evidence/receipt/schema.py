"""What a receipt holds: frozen dataclasses whose fields are those of `receipt.json`.

To let the receipt cover another measure, add a dataclass of its units (windows, items, prompts:
whatever can be measured again one by one), a field of `Receipt` that holds them, and raise
`SCHEMA`: a verifier that does not know it must not pass over it. `claims` then collects it, and
`quantkit.verifying.again` measures it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluators.figures import WindowMeans
from quantkit.errors import QuantkitError
from quantkit.evidence.report import schema as reported
from quantkit.files import write_json
from quantkit.gguf_file.parts import part_names, stem_of
from quantkit.sandbox import untrusted

SCHEMA = 2
NAME = "receipt.json"

BASE = "base"  # the kind, and the name, of the full-precision file
OF_FILE, OF_WEIGHTS = "kl", "weight-kl"  # of the file as it runs; of its weights alone, at F16

MOST_BYTES, _MOST_ITEMS = 32_000_000, 1_000_000
_SUM = "sha256"


@dataclass(frozen=True)
class FileSum:
    """A file's bytes."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Joined:
    """A file that is published in parts: what they are together (`gguf_file.cut`), and their names
    in order.
    """

    n_bytes: int
    sha256: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """The build of llama.cpp that measured, as far as its library tells, and where it ran."""

    llama_cpp_python: str
    ggml: str  # version and commit
    system: str  # what the build uses of the processor
    device: str
    n_threads: int


@dataclass(frozen=True, kw_only=True)
class UsedText:
    """A text to measure on. It lies in `file` beside the receipt if its license allows; `joins`
    are the texts that it consists of, with blank lines between.
    """

    name: str
    sha256: str
    source: str
    license: str | None = None
    file: str | None = None
    joins: tuple[str, ...] | None = None


@dataclass(frozen=True)
class UsedTokens:
    """The windows of a text: sha256 of their token ids (`evaluators.windows.Windows.sha256`)."""

    text: str
    n_ctx: int
    n_windows: int
    sha256: str


@dataclass(frozen=True)
class Windows:
    """One file on the first windows of one text. `kind` is a report's row's, `measure` OF_FILE or
    OF_WEIGHTS.
    """

    file: str
    kind: str
    measure: str
    text: str
    n_ctx: int
    means: WindowMeans


@dataclass(frozen=True)
class Answers:
    """What one file and the base pick of every item of a task, by `acc`. `is_given`: the items are
    a file of whoever made this, called `source`, and not a task that the evaluators know.
    """

    file: str
    kind: str
    task: str
    source: str
    is_given: bool
    items_sha256: str
    picks: tuple[int, ...]
    base_picks: tuple[int, ...]


@dataclass(frozen=True)
class UsedTalks:
    """The conversations of the evaluators that were scored, at most `limit` of each domain. By
    document: its domain and group, and the scored tokens. `sha256` is of their token ids
    (`evaluators.documents.Documents.sha256`).
    """

    limit: int | None
    sha256: str
    domains: tuple[str, ...]
    groups: tuple[str | None, ...]
    n_scored: tuple[int, ...]


@dataclass(frozen=True)
class Talks:
    """One file on the conversations, the mean of each. Of BASE the weights alone are the floor."""

    file: str
    kind: str
    measure: str
    kl: tuple[float, ...]
    top1: tuple[float, ...]


@dataclass(frozen=True)
class UsedPrompts:
    """The first `n` prompts of the evaluators, of which `names` could be asked: what the template
    has begun of each answer, the most tokens of one, how they were asked. `sha256` is
    `evaluators.beside.Asked.sha256`.
    """

    n: int
    names: tuple[str, ...]
    begun: tuple[str, ...]
    n_new: int
    sha256: str
    asked: str
    reason: str


@dataclass(frozen=True)
class Replies:
    """The greedy answers of one file, or of BASE: token ids, whether the last of them ended it, and
    the text. `agreed` are the tokens of each of the base's answers that it would choose, too.
    """

    file: str
    kind: str
    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    texts: tuple[str, ...]
    agreed: tuple[int, ...]


@dataclass(frozen=True)
class Tolerance:
    """How far figures of one window that are measured again may be from the claimed ones: rounding
    of another build or processor (`limits` says where the numbers are from). Of a mean KL `kl` nats
    and `kl_share` of the claim, of a mean -log p `nll`, of the share of equal tokens `top1`. The
    mean of n windows may be off by a window's limit over the root of n; a conversation's limit is
    that of a window of as many tokens. Of n answers `picks` * n may be others, and twice the root
    of that more. Tokens of greedy answers may be `tokens` nats less likely than the likeliest, on
    average of all.
    """

    kl: float
    kl_share: float
    nll: float
    top1: float
    picks: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A whole receipt. `source` is what `quantkit run` was given, where others can get it, and
    `revision` the commit; `files` are all that were published with the receipt, but for the card,
    `joined` are those of our files that are there in parts.
    """

    schema: int = field(default=SCHEMA, init=False)
    model: str
    source: str | None = None
    revision: str | None = None
    seed: int
    commands: tuple[str, ...]
    versions: dict[str, str]
    engine: Engine
    base: FileSum
    files: dict[str, FileSum]
    texts: tuple[UsedText, ...]
    tokens: tuple[UsedTokens, ...]
    windows: tuple[Windows, ...]
    answers: tuple[Answers, ...]
    used_talks: UsedTalks | None = None
    talks: tuple[Talks, ...] = ()
    used_prompts: UsedPrompts | None = None
    replies: tuple[Replies, ...] = ()
    tolerance: Tolerance
    joined: dict[str, Joined] = field(default_factory=dict)
    not_covered: tuple[str, ...]  # figures of the report that it does not let anybody measure again

    def text(self, name: str) -> UsedText | None:
        return next((text for text in self.texts if text.name == name), None)


def to_json(receipt: Receipt) -> dict[str, Any]:
    """Return the receipt as JSON, with the sum of all of it."""
    value: dict[str, Any] = reported.to_json(receipt)
    return {**value, _SUM: sum_of(value)}


def sum_of(value: Mapping[str, Any]) -> str:
    """Return the sha256 of a receipt's JSON but for its sum: keys in order, no spaces, UTF-8."""
    rest = {name: item for name, item in value.items() if name != _SUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, receipt: Receipt) -> Path:
    return write_json(path, to_json(receipt))


def read(path: Path) -> tuple[Receipt, str]:
    """Read anybody's receipt, and the sum that its contents have. Raises QuantkitError for what is
    no receipt, has another version, or another sum than it says.
    """
    try:
        value = untrusted.read_json(path, MOST_BYTES, _MOST_ITEMS)
        if not isinstance(value, dict):
            raise untrusted.Damaged("it is no object")
        found = sum_of(value)
        if value.get(_SUM) != found:
            raise Changed(
                "The receipt was changed: its contents do not have the sum that it says.",
                "Do not trust its figures.",
            )
        if value.get("schema") != SCHEMA:
            raise QuantkitError(
                f"This receipt has schema {str(value.get('schema'))[:20]}, not {SCHEMA}.",
                "Use the version of quantkit that made it.",
            )
        receipt = untrusted.build(Receipt, value)
        _check(receipt)
    except OSError as error:
        raise QuantkitError(f"The receipt cannot be read ({error.strerror}).") from None
    except (untrusted.Damaged, UnicodeEncodeError) as error:
        raise Changed(f"The receipt is damaged: {error}.", "Do not trust its figures.") from None
    return receipt, found


class Changed(QuantkitError):
    """The receipt is not as it was written."""


_MOST_WINDOWS, _MOST_CTX = 100_000, 1_000_000
_MOST_PARTS, _MOST_ROWS = 1000, 5000


def _check(receipt: Receipt) -> None:
    """Raise Damaged for names that lead out of a folder, and counts that do not belong together."""
    lists = receipt.texts, receipt.tokens, receipt.answers, receipt.files
    if max(map(len, lists)) > _MOST_PARTS or len(receipt.windows) > _MOST_ROWS:
        raise untrusted.Damaged("it holds too much")
    named = [*receipt.files, *(text.file for text in receipt.texts if text.file)]
    for name in named:
        parts = name.split("/")
        if not name.isprintable() or len(name) > 300 or set(parts) & {"", ".", ".."}:
            raise untrusted.Damaged("it names a file that cannot be beside it")
    for name, whole in receipt.joined.items():
        # llama.cpp opens the parts by the first one's name: no others may be opened so.
        first = next(iter(whole.parts), "")
        is_named = stem_of(first) == name.removesuffix(".gguf") and part_names(first) == whole.parts
        if not is_named or name in receipt.files or set(whole.parts) - receipt.files.keys():
            raise untrusted.Damaged("it has parts of a file that are not called after it")
    cut = {(t.text, t.n_ctx): t for t in receipt.tokens}
    for tokens in receipt.tokens:
        if receipt.text(tokens.text) is None or not 0 < tokens.n_windows <= _MOST_WINDOWS:
            raise untrusted.Damaged("it has tokens of no text")
        if not 4 <= tokens.n_ctx <= _MOST_CTX:
            raise untrusted.Damaged("it has windows of an impossible length")
    for windows in receipt.windows:
        known = cut.get((windows.text, windows.n_ctx))
        means = windows.means
        lengths = {len(c) for c in (means.kl, means.nll, means.base_nll, means.top1)}
        if known is None or len(lengths) != 1 or not 0 < max(lengths) <= known.n_windows:
            raise untrusted.Damaged("it has windows of no text, or not all figures of them")
    for answers in receipt.answers:
        if not answers.picks or len(answers.picks) != len(answers.base_picks):
            raise untrusted.Damaged("it has answers of the file and not of the base")
    _check_in_use(receipt)


def _check_in_use(receipt: Receipt) -> None:
    """Raise Damaged for conversations and answers that are not of what was asked."""
    if len(receipt.talks) > _MOST_PARTS or len(receipt.replies) > _MOST_PARTS:
        raise untrusted.Damaged("it holds too much")
    asked, n = receipt.used_talks, 0
    if asked is not None:
        n = len(asked.n_scored)
        is_odd = {len(asked.domains), len(asked.groups)} != {n} or not n
        if is_odd or not all(0 < k <= _MOST_CTX for k in asked.n_scored):
            raise untrusted.Damaged("its conversations do not belong together")
    if any(len(t.kl) != n or len(t.top1) != n for t in receipt.talks):
        raise untrusted.Damaged("it has figures of other conversations")
    prompts = receipt.used_prompts
    n_asked = len(prompts.names) if prompts else 0
    if prompts and (len(prompts.begun) != n_asked or not 0 < n_asked <= prompts.n <= _MOST_PARTS):
        raise untrusted.Damaged("its prompts do not belong together")
    most = prompts.n_new if prompts else 0
    for r in receipt.replies:
        if {len(r.tokens), len(r.ended), len(r.texts), len(r.agreed)} != {n_asked}:
            raise untrusted.Damaged("it has answers to other prompts")
        for tokens, ended in zip(r.tokens, r.ended, strict=True):
            if not 0 < len(tokens) <= most or (len(tokens) < most and not ended):
                raise untrusted.Damaged("it has an answer that neither ended nor reached its limit")
