"""Attention block by block: scores and probabilities stay in the cache between their steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from tuner.kernels.buffers import POOL
from tuner.kernels.native import takes

_BLOCK = 1 << 18  # scores of a block, for each thread: 1 MiB


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these: plain fp32 of equal batches, and nobody wants gradients."""
    if torch.is_autocast_enabled("cpu") or not query.numel() or not key.numel():
        return False
    return all(
        takes(x)
        and x.dtype == torch.float32
        and x.shape[:-2] == query.shape[:-2]
        and not (x.requires_grad and torch.is_grad_enabled())
        for x in (query, key, value)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    quantize: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Return quantize(softmax(q kᵀ · scale + mask)) v, to the bit what the whole would give.

    `quantize` receives blocks of probabilities. The causal mask is added, which takes a seventh of
    the time of filling it in; where that is not the same, a softmax is NaN, and None is returned.
    """
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    k = k.transpose(1, 2)
    rows, columns = q.shape[1], k.shape[2]
    count = min(len(q), max(1, _BLOCK * torch.get_num_threads() // (rows * columns)))
    hidden = q.new_full((rows, columns), -torch.inf).triu_(1) if is_causal else None
    out = POOL.empty_rows((len(q), rows, v.shape[2]), q.dtype)
    scores, probabilities = (POOL.empty_rows((count, rows, columns), q.dtype) for _ in range(2))
    for start in range(0, len(q), count):
        block = slice(start, start + count)
        length = min(count, len(q) - start)
        logits = torch.bmm(q[block], k[block], out=scores[:length]).mul_(scale)
        logits = logits if hidden is None else logits.add_(hidden)
        shares = torch.softmax(logits, -1, out=probabilities[:length])
        if bool(shares[..., 0].sum().isnan()):
            return None
        torch.bmm(quantize(shares), v[block], out=out[block])
    return out.view(*query.shape[:-1], value.shape[-1])
