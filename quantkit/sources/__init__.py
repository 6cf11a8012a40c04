"""Resolve MODEL: a Hub model, a folder, a LoRA, a quantized checkpoint, the demo.

inspect    ModelInfo of a Hub model or a folder    metadata    its files without weights
fit        does transformers load it as it is       expected    which tensors it expects
lora       merge an adapter                         dequantize  expand what is quantized
adapted, lora_targets   where PEFT puts an adapter  demo        the demo's model
"""

from __future__ import annotations

from quantkit.sources.inspect import inspect
from quantkit.sources.metadata import fetch_adapter, fetch_metadata

__all__ = ["fetch_adapter", "fetch_metadata", "inspect"]
