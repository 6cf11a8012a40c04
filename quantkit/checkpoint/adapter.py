"""Understand PEFT adapters, LoRAs on top of a base model, before anything is downloaded.

Only settings that are known to be merged exactly are accepted: every other one that has a value is
refused by its name, also those of adapters that are not invented yet.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.info import shown
from quantkit.errors import QuantkitError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "Merge it yourself (peft's merge_and_unload), and give the merged model."
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_MAX_NAMES, _MAX_LENGTH = 10_000, 10_000

# Settings that change nothing of what a trained adapter computes: how it was trained or begun, what
# it was loaded with, names. `auto_mapping` names a class to import: nothing here does.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping inference_mode lora_dropout megatron_core peft_version qalora_group_size"
    " runtime_config eva_config corda_config lora_ga_config loftq_config".split()
)
# Settings that are understood: `read_adapter` looks at each of them.
_UNDERSTOOD = frozenset(
    "alpha_pattern base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out"
    " init_lora_weights layers_pattern layers_to_transform lora_alpha modules_to_save peft_type r"
    " rank_pattern revision target_modules task_type use_rslora".split()
)
_INITS = ("gaussian", "eva", "orthogonal")  # those that leave the base as it is
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")  # others have another head
_BIASES = ("none", "all", "lora_only")
_SAID = {
    "use_dora": "it uses DoRA",
    "lora_bias": "it has biases of its own",
    "target_parameters": "it changes parameters that no linear layer owns",
    "alora_invocation_tokens": "it acts only after these tokens, and a merged one always would",
    "trainable_token_indices": "it replaces single rows of a table",
    "layer_replication": "it repeats layers of its base",
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter says of itself: the base it belongs to, which modules it changes, and how
    strongly. Patterns of module names are regular expressions, those in tuples are their ends.
    """

    base: str
    revision: str | None
    alpha: float
    alphas: dict[str, float]  # patterns of module names whose alpha is another
    rank: int | None
    ranks: dict[str, int]  # patterns of module names whose rank is another
    use_rslora: bool
    is_tied: bool  # where the base's tables are one, its changes are, too
    is_drawn: bool  # modules without tensors would be drawn at random
    targets: str | tuple[str, ...] | None  # None: PEFT's own list of the architecture
    excluded: str | tuple[str, ...]
    whole: tuple[str, ...]  # modules that were trained whole
    layers: tuple[int, ...] | None
    layer_names: tuple[str, ...]


def read_adapter(model: str, paths: Iterable[str], config: Mapping[str, object]) -> Adapter:
    """Raise QuantkitError for adapters that are not plain LoRA in safetensors."""
    present = set(paths)
    if WEIGHTS not in present:
        pickled = "adapter_model.bin" in present
        raise QuantkitError(
            f"{model} is a LoRA adapter without {WEIGHTS}"
            + (": its weights are pickled, which can run code when loaded." if pickled else "."),
            "Save it again with safe_serialization=True, or merge it and give the merged model.",
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise QuantkitError(f"{model} is a LoRA adapter, but names no base model.", MERGE)
    reason = _why_not(config)
    if reason is not None:
        raise QuantkitError(f"{model} is an adapter that cannot be merged here: {reason}.", MERGE)
    read = _Settings(model, config)
    return Adapter(
        base=base,
        revision=read.text("revision"),
        alpha=read.positive("lora_alpha", config.get("lora_alpha")),
        alphas={k: read.positive("alpha_pattern", v) for k, v in read.map("alpha_pattern")},
        rank=None if config.get("r") is None else read.whole_number("r", config["r"]),
        ranks={k: read.whole_number("rank_pattern", v) for k, v in read.map("rank_pattern")},
        use_rslora=read.flag("use_rslora"),
        is_tied=read.flag("ensure_weight_tying"),
        is_drawn=config.get("init_lora_weights") is False,
        targets=read.names("target_modules"),
        excluded=read.names("exclude_modules") or (),
        whole=read.list("modules_to_save"),
        layers=read.layers(),
        layer_names=read.list("layers_pattern"),
    )


def _why_not(config: Mapping[str, object]) -> str | None:
    """A clause that names the first setting that is not understood; None where all are."""
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind != "LORA":
        return f"it is of the kind {shown(kind)}, not LORA"
    for name, value in config.items():
        if name in _UNDERSTOOD or name in _WITHOUT_EFFECT or not _matters(value):
            continue
        about = _SAID.get(name, "which is not understood")
        return f"{about} ({shown(name)})" if name in _SAID else f"it sets {shown(name)}, {about}"
    initial = config.get("init_lora_weights", True)
    if not isinstance(initial, bool) and str(initial).lower() not in _INITS:
        return f"its base was changed when it was made (init_lora_weights={shown(repr(initial))})"
    task = config.get("task_type")
    if task is not None and task not in _TASKS:
        return f"it is for another task than continuing text (task_type={shown(repr(task))})"
    if config.get("bias", "none") not in _BIASES:
        return f"its bias is {shown(repr(config['bias']))}"
    return None


def _matters(value: Any) -> bool:
    return not (value is None or value is False or value in ("", [], {}))


class _Settings:
    """Values of the settings, of the kinds that PEFT writes. Raises QuantkitError for others."""

    def __init__(self, model: str, config: Mapping[str, object]) -> None:
        self._model, self._config = model, config

    def _refusal(self, name: str) -> QuantkitError:
        value = shown(repr(self._config.get(name)))
        return QuantkitError(f"{CONFIG} of {self._model} has an unusable {name}: {value}.", MERGE)

    def text(self, name: str) -> str | None:
        value = self._config.get(name)
        return value if isinstance(value, str) and value else None

    def flag(self, name: str) -> bool:
        value = self._config.get(name)
        if value not in (None, True, False):
            raise self._refusal(name)
        return bool(value)

    def positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._refusal(name)
        return float(value)

    def whole_number(self, name: str, value: Any) -> int:
        if self.positive(name, value) != int(value):
            raise self._refusal(name)
        return int(value)

    def map(self, name: str) -> list[tuple[str, Any]]:
        value = self._config.get(name) or {}
        if not isinstance(value, dict) or len(value) > _MAX_NAMES:
            raise self._refusal(name)
        return [(self._pattern(name, pattern), item) for pattern, item in value.items()]

    def list(self, name: str) -> tuple[str, ...]:
        value = self._config.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or len(value) > _MAX_NAMES:
            raise self._refusal(name)
        return tuple(self._pattern(name, item) for item in value)

    def names(self, name: str) -> str | tuple[str, ...] | None:
        value = self._config.get(name)
        if value is None:
            return None
        return self._pattern(name, value) if isinstance(value, str) else self.list(name)

    def layers(self) -> tuple[int, ...] | None:
        value = self._config.get("layers_to_transform")
        value = [value] if type(value) is int else value
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(type(n) is int for n in value):
            raise self._refusal("layers_to_transform")
        return tuple(value)

    def _pattern(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_LENGTH:
            raise self._refusal(name)
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError):
            raise self._refusal(name) from None
        return value


def overlay(adapter: Path, names: Iterable[str], folder: Path) -> None:
    """Put the adapter's tokenizer and chat template over the base's files in `folder`.

    A template that the fine-tune brings, in whichever file, replaces the base's.
    """
    own = [name for name in names if name not in (CONFIG, WEIGHTS, "config.json")]
    settings = adapter / "tokenizer_config.json"
    in_settings = settings.is_file() and '"chat_template"' in settings.read_text("utf-8")
    if in_settings or any(name in _TEMPLATES for name in own):
        for name in _TEMPLATES:
            (folder / name).unlink(missing_ok=True)
    for name in own:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copyfile(adapter / name, target)
