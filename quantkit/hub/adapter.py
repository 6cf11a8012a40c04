"""PEFT adapters: a LoRA on top of a base model, understood before anything is downloaded.

Only what `quantkit.lora` merges exactly is accepted; everything else is refused by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "Merge it yourself (peft's merge_and_unload), and give the merged model."
_INITS = ("gaussian", "eva", "orthogonal")  # those that leave the base as it is
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Adapter:
    """What an adapter says of itself: the base it belongs to, and how strongly it is added."""

    base: str
    revision: str | None
    alpha: float
    alphas: dict[str, float]  # patterns of module names whose alpha is another
    use_rslora: bool
    transposed: bool  # weights are stored (in, out): fan_in_fan_out


def read_adapter(model: str, paths: Iterable[str], config: dict[str, Any]) -> Adapter:
    """Raises QuantkitError for adapters that are not plain LoRA in safetensors."""
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
        raise QuantkitError(f"{model} is a LoRA adapter and names no base model.", _MERGE)
    kind = str(config.get("peft_type") or "LORA").upper()
    initial = config.get("init_lora_weights", True)
    reason = None
    if kind != "LORA":
        reason = f"it is of the kind {kind}, not LORA"
    elif config.get("use_dora"):
        reason = "it uses DoRA"
    elif config.get("lora_bias"):
        reason = "it has biases of its own (lora_bias)"
    elif config.get("target_parameters"):
        reason = "it changes parameters that no linear layer owns (target_parameters)"
    elif isinstance(initial, str) and initial.lower() not in _INITS:
        reason = f"its base was changed when it was made (init_lora_weights={initial!r})"
    if reason is not None:
        raise QuantkitError(f"{model} is an adapter that cannot be merged here: {reason}.", _MERGE)
    try:
        alphas = {str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()}
        alpha = float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise QuantkitError(f"{CONFIG} of {model} has no lora_alpha.", _MERGE) from None
    revision = config.get("revision")
    return Adapter(
        base,
        revision if isinstance(revision, str) and revision else None,
        alpha,
        alphas,
        bool(config.get("use_rslora")),
        bool(config.get("fan_in_fan_out")),
    )


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
