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
    heads = query.shape[-3] if query.ndim > 3 else 1
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    shape = len(q) // heads, q.shape[1], heads, v.shape[2]
    out = POOL.empty_rows(shape, q.dtype).transpose(1, 2)  # as the fused op lays it out
    for rows, keys in _parts(q.shape[1], k.shape[1], is_causal):
        mask = None
        if is_causal:
            later = rows.stop - rows.start, max(0, keys.stop - rows.start)
            mask = q.new_full(later, -torch.inf).triu_(1)
        scores = (rows.stop - rows.start) * keys.stop
        for block, target in _blocks(out, _BLOCK * torch.get_num_threads() // scores):
            shares = _shares(q[block, rows], k[block, keys], scale, mask)
            part = torch.bmm(quantize(shares), v[block, keys])
            target[:, :, rows] = part.view(*target.shape[:2], *part.shape[1:])
    if is_causal and bool(out.sum().isnan()):
        return None
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _parts(queries: int, keys: int, is_causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the queries that are computed together, and the keys that they may see."""
    if not is_causal:
        yield slice(0, queries), slice(0, keys)
        return
    for start in range(0, queries, _ROWS):
        stop = min(start + _ROWS, queries)
        yield slice(start, stop), slice(0, min(stop, keys))


def _blocks(out: Tensor, most: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut `[batch, heads, …]` into whole samples, or one sample's heads: at most so many heads.

    Yields where a block lies among the heads of all samples, and its part of `out`.
    """
    batch, heads = out.shape[:2]
    samples, count = max(1, most // heads), min(heads, max(1, most))
    for sample in range(0, batch, samples):
        for head in range(0, heads, count):
            target = out[sample : sample + samples, head : head + count]
            start = sample * heads + head
            yield slice(start, start + target.shape[0] * target.shape[1]), target


def _shares(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ · scale + hidden), in the memory of q kᵀ; `hidden` is of the last keys.

    Each row of a softmax is read before it is written.
    """
    scores = POOL.empty_rows((*q.shape[:2], k.shape[1]), q.dtype)
    torch.bmm(q, k.transpose(1, 2), out=scores).mul_(scale)
    if hidden is not None and hidden.shape[1]:
        scores[..., -hidden.shape[1] :].add_(hidden)
    return torch.softmax(scores, -1, out=scores)
