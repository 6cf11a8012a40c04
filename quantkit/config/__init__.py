"""The configuration of a run: `RunConfig`, sizes, and the table of profiles."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from quantkit.config.calibration import parse_spec
from quantkit.config.targets import DEFAULT_TARGET, Target
from quantkit.errors import UsageError
from quantkit.ggml.types import CODEBOOK_TYPES, F32, QuantType, askable
from quantkit.sandbox.untrusted import Damaged, build
from quantkit.tensors import METHODS

AT_LEAST = ">="  # before a type of `--types`
DEMO_MODEL = "demo:smollm2-135m"
MOST_STEPS = 10_000  # of tuning a block
SPLIT_BYTES = 50_000_000_000  # the Hub takes no larger file
N_CTX = 512  # tokens of a sequence of calibration, search and tuning
TUNING_BATCH = 2  # sequences that a step of tuning sees


@dataclass(frozen=True)
class Effort:
    """The work of validation in addition to the KL of each file."""

    n_below: int  # stock files of at most our size that are measured: the largest ones
    n_uniform: int  # of our own uniform files: the largest of at most our size, the next larger
    weight_windows: int | None  # of each domain, for the KL of the weights alone; None: all
    rows: int | None  # of each tensor, decoded a second time; None: all
    n_items: int  # zero-shot items
    speed: tuple[int, int, int]  # tokens of prompt and of answer, repeats
    long: tuple[int, ...] = ()  # tokens of a window, for the KL in long contexts
    answers: tuple[int, int] = (40, 128)  # prompts that all answer, tokens of an answer at most
    documents: int | None = None  # conversations of each domain, for their KL; None: all


@dataclass(frozen=True)
class Profile:
    """How much work a run does. One table, shown in docs/options.md."""

    calibration_tokens: int
    heldout_tokens: int  # judge the quantizers (held-out Hessian) and nothing else
    search_tokens: int  # evaluated by the search, all candidates together
    eval_windows: int  # of 512 tokens, per domain, in validation
    n_sweeps: int  # of descent over codes and scales after GPTQ
    tuning_steps: int  # by gradient, of every block of a found allocation
    effort: Effort
    levels: tuple[str, ...]
    about: str


_LEVELS = (
    *(qtype.name for qtype in CODEBOOK_TYPES),
    *("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q4_1", "Q5_K", "Q6_K", "Q8_0"),
)
PREFERENCES = ("quality", "speed")

PROFILES = {
    "demo": Profile(
        calibration_tokens=20_480,
        heldout_tokens=4_096,
        search_tokens=24_576,
        eval_windows=2,
        n_sweeps=2,
        tuning_steps=0,
        effort=Effort(3, 0, 2, 32, 60, (128, 32, 2), answers=(8, 32), documents=1),
        levels=("Q4_K", "Q4_1", "Q5_K", "Q6_K"),
        about="minutes on 2 cores, 135M parameters",
    ),
    "fast": Profile(
        calibration_tokens=65_536,
        heldout_tokens=16_384,
        search_tokens=65_536,
        eval_windows=20,
        n_sweeps=4,
        tuning_steps=0,
        effort=Effort(2, 2, 10, None, 200, (256, 32, 2), (4096,), (40, 64)),
        levels=_LEVELS,
        about="tens of minutes on 2 cores; a first look",
    ),
    "standard": Profile(
        calibration_tokens=131_072,
        heldout_tokens=32_768,
        search_tokens=524_288,
        eval_windows=40,
        n_sweeps=4,
        tuning_steps=200,
        effort=Effort(3, 2, None, None, 500, (512, 64, 3), (4096, 16_384)),
        levels=_LEVELS,
        about="an hour on 2 cores at 135M; minutes on a GPU",
    ),
    "thorough": Profile(
        calibration_tokens=262_144,
        heldout_tokens=65_536,
        search_tokens=2_097_152,
        eval_windows=80,
        n_sweeps=4,
        tuning_steps=400,
        effort=Effort(3, 2, None, None, 2000, (512, 64, 3), (4096, 16_384, 32_768), (40, 256)),
        levels=_LEVELS,
        about="overnight on a CPU; when the file will have many users",
    ),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result. Saved as `config.json`; never holds a token."""

    model: str
    revision: str | None = None
    targets: tuple[Target, ...] = ()  # none: like Q4_K_M, or what the given types come to
    profile: str = "standard"
    # Tensor types to choose from; None: the profile's, and the 16 bits of the original.
    levels: tuple[str, ...] | None = None
    prefer: str = "quality"  # speed: of the profile's types none that is slow to decode on a CPU
    levels_from: tuple[str, ...] = ()  # GGUFs of others whose tensors compete: paths or hf://...
    methods: tuple[str, ...] = METHODS
    types: tuple[tuple[str, str], ...] = ()  # (tensor-name regex or "default", type): not searched;
    # with `>=` before the type what is named has at least that
    max_types: int | None = None  # distinct types among the searched tensors
    tuning: int | None = None  # steps by gradient of every block; None: the profile's
    tensors: str | None = None  # regex: only these are quantized
    calibration: str = "auto"
    eval_text: str | None = None
    tasks: str | None = None
    compare: tuple[str, ...] = ()  # GGUFs to measure beside ours: paths or hf://owner/name/file
    equalize: bool = False  # move powers of two between channels and their readers
    seed: int = 0
    device: str = "cpu"
    publish: str | None = None
    private: bool = False
    public: bool = False  # a private or gated model's file is published privately without this
    split_bytes: int = SPLIT_BYTES  # files of more are published in parts
    # Of the Hub, that the published repository is put into: the last part of its URL, or a title.
    collection: str | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UsageError(
                f"There is no profile {self.profile!r}.", "Use one of " + ", ".join(PROFILES) + "."
            )
        whole = [q for q in map(askable, self.level_names) if not q.is_quantized]
        if F32 in whole or len(whole) == len(self.level_names):
            raise UsageError(
                f"{whole[0]} is not a quantized type.",
                "Name quantized types beside F16 or BF16, or pin single tensors with --types.",
            )
        if self.prefer not in PREFERENCES:
            raise UsageError(
                f"There is no preference {self.prefer!r}.",
                "Use one of " + ", ".join(PREFERENCES) + ".",
            )
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise UsageError(
                f"Unknown method {', '.join(unknown) or '(none)'}.",
                "Use some of " + ", ".join(METHODS) + ".",
            )
        for pattern, qtype in self.types:
            askable(qtype.removeprefix(AT_LEAST))
            compile_pattern(pattern)
            if pattern == "default" and qtype.startswith(AT_LEAST):
                raise UsageError(
                    f"The default type cannot be {qtype}.", "Leave smaller types out of --levels."
                )
        if self.max_types is not None and self.max_types < 1:
            raise UsageError("There must be at least one type.", "Use --max-types 1 or more.")
        if self.tuning is not None and not 0 <= self.tuning <= MOST_STEPS:
            raise UsageError(
                f"{self.tuning} is not a number of steps.",
                f"Use 0 to {MOST_STEPS:,}; 0 turns tuning off.",
            )
        if self.tensors is not None:
            compile_pattern(self.tensors)
        parse_spec(self.calibration)
        if not 0 <= self.seed < 2**63:
            raise UsageError(
                f"{self.seed} is not a seed.", "Use a number from 0 to 9223372036854775807."
            )
        if self.split_bytes < 1:
            raise UsageError("A part has at least one byte.", "Use --split-at 50GB or so.")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"There is no device {self.device!r}.", "Use cpu or cuda.")

    @property
    def sizes(self) -> str:
        """Return what was asked for, for people."""
        return ", ".join(map(str, self.targets)) or str(DEFAULT_TARGET)

    @property
    def tuning_steps(self) -> int:
        """Steps by which every block of the found allocation is tuned."""
        return PROFILES[self.profile].tuning_steps if self.tuning is None else self.tuning

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the types to choose from; `wanted` says which of a profile's are made."""
        if self.levels:
            return self.levels
        slow = {qtype.name for qtype in CODEBOOK_TYPES} if self.prefer == "speed" else set()
        return tuple(name for name in PROFILES[self.profile].levels if name not in slow)

    def pinned_type(self, tensor: str) -> QuantType | None:
        """Return the type that `types` gives to `tensor`: the first pattern found in its name, else
        the default, else None.
        """
        given = [row for row in self.types if not row[1].startswith(AT_LEAST)]
        for pattern, qtype in given:
            if pattern != "default" and compile_pattern(pattern).search(tensor):
                return QuantType(qtype)
        return next((QuantType(qtype) for pattern, qtype in given if pattern == "default"), None)

    def least_type(self, tensor: str) -> QuantType | None:
        """Return the smallest type that `types` allows for `tensor`: that of the first `>=` pattern
        found in its name.
        """
        for pattern, qtype in self.types:
            if qtype.startswith(AT_LEAST) and compile_pattern(pattern).search(tensor):
                return QuantType(qtype.removeprefix(AT_LEAST))
        return None

    @classmethod
    def from_json(cls, value: object) -> RunConfig:
        """Return the config of its JSON. Raise Damaged for what is none, or has options that are
        another version's; UsageError as for what a user types.
        """
        config = build(cls, value)
        unknown = value.keys() - vars(config).keys() if isinstance(value, dict) else ()
        if unknown:
            raise Damaged(f"there is no option {min(unknown)}")
        return config

    # What may differ when a run is started again in the same folder: where it is published, and
    # what it is only measured on and beside (the measuring is done again then).
    MEASURED_ON = ("eval_text", "tasks", "compare")
    FREE_ON_RESUME = ("publish", "private", "public", "collection", *MEASURED_ON)

    def changed_fields(self, other: RunConfig) -> list[str]:
        """Return the names of the fields that differ and decide the result."""
        names = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in self.FREE_ON_RESUME
        ]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a user's regex for tensor names. Raises UsageError when it is not one."""
    if len(pattern) > 200:
        raise UsageError(
            "A tensor pattern is longer than 200 characters.", "Write shorter patterns."
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression: {error}.",
            "Write one like 'ffn_down' or 'blk\\.0\\.'.",
        ) from None


def load_types_map(path: Path) -> tuple[tuple[str, str], ...]:
    """Load `--types MAP.json`: an object of tensor-name regexes (and `default`) to types, in the
    order written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise ValueError("it is not an object of strings")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The type map {path} cannot be read: {error}.",
            'Write {"default": "Q4_K", "ffn_down": "Q6_K"}.',
        ) from None
    return tuple(value.items())
