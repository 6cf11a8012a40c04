"""Find out which languages a model knows.

The same eight sentences say the same in every language, whatever the script and the tokenizer. A
model that knows a language needs few bits for them in it; one that does not needs several times as
many.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.config.languages import LANGUAGES, sentences

# With more the model does not know the language. SmolLM2, which needs 527 in English, gains from
# calibrating on Spanish (933) and French (952) and not on German (1085): dev/LOG.md.
MOST_BITS = 1000


@torch.no_grad()
def bits_of(model: PreTrainedModel, tokenizer: Any, texts: tuple[str, ...]) -> float:
    """Return the bits that a model needs for texts, one a line."""
    ids = tokenizer("\n" + "\n".join(texts), return_tensors="pt").input_ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    return nats.item() / math.log(2)


def bits_by_language(model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
    """Return the bits that a model needs for the sentences in English ("en") and in every
    language.
    """
    return {code: bits_of(model, tokenizer, sentences(code)) for code in ("en", *LANGUAGES)}
