"""Linear layers of a GGUF that transformers' model rightly lacks, each with its reason. Any other
missing one shows that the two are different models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BLOCK = re.compile(r"blk\.(\d+)\.")


def reason_of(metadata: Mapping[str, Any], tensor: str) -> str | None:
    """Return why a tensor of a GGUF with these keys is not in the model that transformers loads;
    None where it should be.

    DeepSeek-V3, GLM-4.5, Qwen3-Next and others ship blocks that guess a token further on: llama.cpp
    counts them as its last blocks, transformers leaves them in the checkpoint.
    """
    architecture = metadata["general.architecture"]
    n_heads = int(metadata.get(f"{architecture}.nextn_predict_layers", 0))
    n_blocks = int(metadata.get(f"{architecture}.block_count", 0))
    found = _BLOCK.match(tensor)
    if n_heads and found and int(found[1]) >= n_blocks - n_heads:
        return "a prediction head, which transformers does not load"
    return None
