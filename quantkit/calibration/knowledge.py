"""Which languages a model knows.

A model that knows a language needs not many more bits for sentences in it than for the same ones in
English, whatever the script and the tokenizer; one that does not needs several times as many.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.calibration.languages import LANGUAGES, sentences

# Of the English sentences' bits; with more the model does not know the language. SmolLM2 gains from
# calibrating on Spanish (1.77) and French (1.81) and not on German (2.07): dev/LOG.md.
MOST_BITS = 1.9


@torch.no_grad()
def bits_of(model: PreTrainedModel, tokenizer: Any, texts: tuple[str, ...]) -> float:
    """The bits that a model needs for texts, one a line."""
    ids = tokenizer("\n" + "\n".join(texts), return_tensors="pt").input_ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    return nats.item() / math.log(2)


def relative_bits(model: PreTrainedModel, tokenizer: Any) -> dict[str, float]:
    """By language the bits that a model needs for the sentences, over those for the English."""
    reference = bits_of(model, tokenizer, sentences("en"))
    return {code: bits_of(model, tokenizer, sentences(code)) / reference for code in LANGUAGES}
