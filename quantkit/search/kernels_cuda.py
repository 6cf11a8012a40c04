"""Cross-entropies on a GPU in one pass over the vocabulary's memory.

Only imported where there is a GPU. What it computes is that of `Targets.kl`, whose torch form reads
and writes whole tables of logits several times.
"""

from __future__ import annotations

import torch

from quantkit.ggml.searches_cuda import tl, triton

_BLOCK = 2048


@triton.jit
def _cross_entropy(i_rows, p_rows, z_rows, out, share, n_vocab, n_kept, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i_row, p_row, z_row = i_rows + row * n_kept, p_rows + row * n_kept, z_rows + row * n_vocab
    lanes = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_vocab, BLOCK):
        z = tl.load(z_row + start + lanes, mask=start + lanes < n_vocab, other=-1e30)
        higher = tl.maximum(high, z)
        total = total * tl.exp(high - higher) + tl.exp(z - higher)
        high = higher
    highest = tl.max(high, 0)
    log_total = highest + tl.log(tl.sum(total * tl.exp(high - highest), 0))
    # The row is still in the cache. Differences first: the sum then runs over small numbers.
    sums = tl.zeros([BLOCK], tl.float32)
    shares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_kept, BLOCK):
        inside = start + lanes < n_kept
        i = tl.load(i_row + start + lanes, mask=inside, other=0)
        z = tl.load(z_row + i, mask=inside, other=-1e30)
        p = tl.load(p_row + start + lanes, mask=inside, other=0.0).to(tl.float32)
        sums += tl.where(inside, p * (log_total - z), 0.0)
        shares += tl.exp(z - log_total)
    tl.store(out + row, tl.sum(sums.to(tl.float64), 0))
    tl.store(share + row, tl.sum(shares.to(tl.float64), 0))


def cross_entropy(
    ids: torch.Tensor, p: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums over tokens `ids` of p times -log softmax(logits), and of softmax(logits):
    float64 (n,) each, of ids, int32 (n, k), weights p, float16 (n, k), and logits, float32
    (n, n_vocab), all on one GPU.
    """
    ids, p, logits = ids.contiguous(), p.contiguous(), logits.contiguous()
    out = torch.empty(len(p), dtype=torch.float64, device=p.device)
    share = torch.empty_like(out)
    with torch.cuda.device(p.device):
        _cross_entropy[(len(p),)](
            ids, p, logits, out, share, logits.shape[1], p.shape[1], BLOCK=_BLOCK, num_warps=8
        )
    return out, share
