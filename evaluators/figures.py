"""What is measured, as values: means with their errors, tests, rates. They are what the commands
print, and need nothing to be read again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Interval = tuple[float, float]  # 95 %


@dataclass(frozen=True)
class Mean:
    """A mean in nats per token. `stderr` is llama-perplexity's (tokens independent)."""

    mean: float
    stderr: float

    @property
    def value(self) -> float:
        return self.mean

    @property
    def is_known(self) -> bool:
        """False for what could not be measured."""
        return not math.isnan(self.value)


@dataclass(frozen=True)
class MeanNats(Mean):
    """`ci95` takes windows as the unit (None with a single window), `n` counts scored tokens."""

    ci95: Interval | None
    n: int


@dataclass(frozen=True)
class Divergence(Mean):
    """Mean KL in nats with its errors (see `evaluators.stats`), and where the tokens lie."""

    ci95: Interval | None
    median: float
    p99: float
    p999: float
    max: float
    n: int


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean -log p; errors as in `MeanNats`."""

    value: float
    stderr: float
    ci95: Interval | None
    n: int


@dataclass(frozen=True)
class WindowMeans:
    """A mean for each window of a text: KL and -log p in nats, the base's -log p, and the share of
    tokens with the base's most likely next one.
    """

    kl: tuple[float, ...]
    nll: tuple[float, ...]
    base_nll: tuple[float, ...]
    top1: tuple[float, ...]


@dataclass(frozen=True)
class PairedTest:
    """Mean difference of two files on the same windows (a - b; below zero, a is better).

    `stderr` and `ci95` take windows as the unit, `p_value` is two-sided Student t, `significant`
    says whether the interval excludes zero.
    """

    difference: float
    stderr: float
    ci95: Interval
    p_value: float
    n_windows: int
    significant: bool


@dataclass(frozen=True)
class Agreement:
    """KL(reference || llama.cpp) in nats over `n` tokens, and the share with the same top-1.

    `trimmed_kl` is the mean without the worst fiftieth of the tokens, at least one: where a model
    routes tokens to experts, a tie within rounding falls either way, and that token then has
    another output though nothing is wrong.
    """

    mean_kl: float
    trimmed_kl: float
    max_kl: float
    top1: float
    n: int


@dataclass(frozen=True)
class Rate:
    """`tokens` a repeat; `tokens_per_second` of the best one."""

    tokens: int
    tokens_per_second: float
    repeats: tuple[float, ...]


@dataclass(frozen=True)
class SpeedResult:
    """`peak_rss_bytes` with a context of `n_ctx`, of the process and not of a GPU; `buffers` are
    bytes by kind, wherever they lie: model, kv, compute, output. `device` is the CPU or the GPUs'
    names. A report of many machines' files leaves `file` out.
    """

    file: str | None = field(default=None, kw_only=True)
    device: str | None = field(default=None, kw_only=True)
    n_bytes: int
    n_ctx: int
    load_seconds: float
    prompt: Rate
    generation: Rate
    peak_rss_bytes: int
    buffers: dict[str, int]
    n_threads: int
    n_gpu_layers: int


@dataclass(frozen=True)
class Accuracy:
    """Share of items answered right; `stderr` is sample deviation / sqrt(n), as lm-eval's."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Flips:
    """Items whose pick differs from the base's: of all `n` flips, `gained` became right, `lost`
    became wrong. `p_value` is that of gains and losses being a coin's work (McNemar, exact).
    """

    n: int
    fraction: float
    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class Overlap:
    """Runs of 13 words of a text: `n` in all, and `n_seen` that also stand in the text that a file
    was calibrated on (`evaluators.overlap`).
    """

    n: int
    n_seen: int
    share: float


@dataclass(frozen=True)
class ItemOverlap:
    """Items of a task: `n_seen` share 13 words in a row with the text that a file was calibrated
    on, `n_short` are too short to be judged.
    """

    n_items: int
    n_short: int
    n_seen: int


@dataclass(frozen=True)
class Share:
    """`n_yes` of `n`, and Wilson's interval of the share."""

    value: float
    ci95: Interval
    n_yes: int
    n: int


@dataclass(frozen=True)
class SideBySide:
    """The share of the base's answers and of the file's to the same prompts, of which something is
    true. `p_value` is that of the prompts where only one's is being a coin's work (McNemar, exact).
    """

    base: Share
    file: Share
    p_value: float


@dataclass(frozen=True)
class Estimate:
    """A mean, a ratio or a quantile over `n` documents or prompts, which are the unit of `ci95`.
    Below 20 of them the interval is rough (`is_rough`), of one or two there is none.
    """

    value: float
    ci95: Interval | None
    n: int

    @property
    def is_rough(self) -> bool:
        return self.n < LEAST_DOCUMENTS


LEAST_DOCUMENTS = 20  # from here on intervals cover as they say: benchmarks/interval_coverage.py


@dataclass(frozen=True)
class OnDocuments:
    """KL(base || file) in nats over `n_tokens` tokens of documents, and the share with the base's
    most likely next token.
    """

    kl: Estimate
    median: Estimate
    p99: Estimate
    p999: Estimate
    max: float
    top1: Estimate
    n_tokens: int


@dataclass(frozen=True)
class Thinking:
    """Answers that think first: how many of the base's do, the ratio of what is thought in
    characters, and which come to an end of it.
    """

    n: int
    length: Estimate
    finished: SideBySide


@dataclass(frozen=True)
class AnswersBeside:
    """A file's greedy answers beside the base's, of at most `n_new` tokens each.

    `before_difference` are the tokens of an answer before the first that differs, `length` the
    ratio of tokens (file over base). `agreement`: having read the base's answer up to a token, the
    share of those that the file would choose, too; what follows from a first difference does not
    count there. `asked`: chat template, or plain text. Tool calls and JSON are None where no prompt
    asks for them; `same_calls` are of those that the base's answers make.
    """

    n_prompts: int
    n_left_out: int
    n_new: int
    n_tokens: int
    prompts_sha256: str
    asked: str
    reason: str | None = field(default=None, kw_only=True)
    identical: Share
    before_difference: Estimate
    agreement: Estimate
    length: Estimate
    unfinished: SideBySide
    loops: SideBySide
    tool_calls: SideBySide | None = None
    same_calls: Share | None = None
    json: SideBySide | None = None
    thinking: Thinking | None = None
