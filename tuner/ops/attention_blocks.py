"""Attention block by block: scores and probabilities stay in the cache between their steps."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tuner.kernels.buffers import POOL
from tuner.kernels.native import takes

_BLOCK = 1 << 18  # scores of a block, for each thread: 1 MiB
_ROWS = 64  # queries of a causal block, whose later keys are left out


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes these: plain fp32 of equal batches, and nobody wants gradients."""
    if torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"):
        return False
    if not query.numel() or not key.numel():
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
    the time of filling it in; where that is not the same, NaN comes out, and None is returned. What
    it hides of a whole block is not computed.
    """
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    hidden = q.new_full((q.shape[1], k.shape[1]), -torch.inf).triu_(1) if is_causal else None
    out = POOL.empty_rows((*q.shape[:2], v.shape[2]), q.dtype)
    for rows, keys in _parts(q.shape[1], k.shape[1], is_causal):
        mask = None if hidden is None else hidden[rows, keys]
        scores = (rows.stop - rows.start) * keys.stop
        count = max(1, _BLOCK * torch.get_num_threads() // scores)
        for start in range(0, len(q), count):
            block = slice(start, start + count)
            shares = _shares(q[block, rows], k[block, keys], scale, mask)
            torch.bmm(quantize(shares), v[block, keys], out=out[block, rows])
    return None if bool(out.sum().isnan()) else out.view(*query.shape[:-1], value.shape[-1])


def _parts(queries: int, keys: int, is_causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the queries that are computed together, and the keys that they may see."""
    if not is_causal:
        yield slice(0, queries), slice(0, keys)
        return
    for start in range(0, queries, _ROWS):
        stop = min(start + _ROWS, queries)
        yield slice(start, stop), slice(0, min(stop, keys))


def _shares(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ · scale + hidden); what comes next finds the memory of q kᵀ free."""
    shape = *q.shape[:2], k.shape[1]
    scores, shares = (POOL.empty_rows(shape, q.dtype) for _ in range(2))
    torch.bmm(q, k.transpose(1, 2), out=scores).mul_(scale)
    scores = scores if hidden is None else scores.add_(hidden)
    return torch.softmax(scores, -1, out=shares)
