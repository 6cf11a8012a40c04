"""Weights of tiny random checkpoints, scaled so that logits spread.

With the usual initialization every token is as likely as any other, and then a wrong model computes
the same.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel

SPREAD = 3.5  # standard deviation of a position's logits
_ROUTERS = (".gate.weight", ".router.weight", ".router.proj.weight")


def enliven(model: PreTrainedModel) -> None:
    """Give every matrix outputs of about the size of its inputs, every norm and bias a value of its
    own, and the logits a standard deviation of SPREAD.
    """
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings().weight
    # Small beside what blocks add where the head is tied: else it only ever repeats the token.
    std = 0.02 if id(head) in lookups else 1.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if name.endswith(("A_log", "dt_bias", ".D")):  # state space models: as initialized
                continue
            jitter = 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter + jitter if parameter.abs().sum() else jitter)
        elif id(parameter) in lookups:
            nn.init.normal_(parameter, std=std)
        elif "conv" not in name:
            # Decided choices of experts: where two are level, rounding chooses.
            gain = 6 if name.endswith(_ROUTERS) else 1
            nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
    for module in model.modules():  # Gemma 4 leaves scales of attention and routers to training
        if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
            module.q_norm.weight.mul_(module.head_dim**-0.5)
        if hasattr(module, "layer_scalar"):  # a buffer
            module.layer_scalar.uniform_(0.7, 1.0)
        if hasattr(module, "scalar_root_size"):
            module.scale.div_(module.scalar_root_size)
    if id(head) not in lookups:
        head.mul_(SPREAD / _spread(model))
        return
    # Tied: the last norm's gain scales the logits. Gemma's was one more than its weight until 4.
    norms = [n for n, p in model.named_parameters() if p.dim() == 1 and not _IN_BLOCK.search(n)]
    outside = [n for n in norms if n.endswith("weight") and "per_layer" not in n]
    norm = model.get_parameter(outside[-1])
    offset = float(model.config.model_type.startswith(("gemma2", "gemma3")))
    norm.copy_((norm + offset) * (SPREAD / _spread(model)) - offset)


_IN_BLOCK = re.compile(r"\.\d+\.")


def _spread(model: PreTrainedModel) -> float:
    ids = torch.arange(13, 77)[None]
    return float(model(input_ids=ids, use_cache=False).logits[0].std(-1).mean())
