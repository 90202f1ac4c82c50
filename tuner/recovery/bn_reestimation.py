"""Batch norm re-estimation: running statistics taken anew from the quantized model.

Lower precision shifts mean and variance in front of each norm; to take them anew on some batches
puts that right (Sun et al., Hybrid 8-bit Floating Point Training and Inference, NeurIPS 2019).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuner.errors import DataError
from tuner.sites import own_class

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def reestimate_batch_norms(
    model: nn.Module,
    batches: Iterable[Any],
    feed: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> int:
    """Take running mean and variance of every batch norm anew, in place; return how many there are.

    Every norm that keeps running statistics and is not folded away normalizes by each batch's own
    statistics while the batches run, and keeps the plain average of all batches' means and
    (unbiased) variances. Everything else stays in its mode: dropout stays off. Nothing is left
    changed but the statistics: `training` and `momentum` of each norm are put back, and so is
    `num_batches_tracked`, which counts batches of training. A norm that no batch reached, and all
    norms where a batch fails, keep their old statistics.

    Raises DataError if there are norms but no batches, or if a batch has one value a channel.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and keeps_statistics(m)]
    if not norms:
        return 0
    with torch.no_grad(), _averaging(norms):
        count = 0
        for batch in batches:
            _run(model, batch, feed, count)
            count += 1
        if not count:
            raise DataError("there are no batches to take the statistics from: give at least one")
    return len(norms)


def _run(model: nn.Module, batch: Any, feed: Callable[[nn.Module, Any], Any], index: int) -> None:
    try:
        feed(model, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            f"batch {index} gives a batch norm one value a channel, which has no variance: "
            f"give larger batches ({error})"
        ) from error


def keeps_statistics(norm: nn.Module) -> bool:
    """Return whether a batch norm has statistics, and computes as torch's do (no folded one)."""
    if not isinstance(norm, _BatchNorm):
        return False
    has_all = all(isinstance(norm._buffers.get(name), Tensor) for name in _STATISTICS)
    return own_class(norm).forward is _BatchNorm.forward and norm.track_running_stats and has_all


@contextmanager
def _averaging(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let the norms average over batches; on an exception they get their statistics back."""
    kept = [_State(norm) for norm in norms]
    try:
        for norm in norms:
            assert norm.num_batches_tracked is not None
            norm.training, norm.momentum = True, None
            norm.num_batches_tracked.zero_()
        yield
    except BaseException:
        for state in kept:
            state.restore_statistics()
        raise
    finally:
        for state in kept:
            state.restore_mode()


class _State:
    """What a norm was before."""

    def __init__(self, norm: _BatchNorm) -> None:
        self._norm = norm
        self._mode = norm.training, norm.momentum
        self._buffers = {name: b.clone() for name, b in norm.named_buffers()}

    def restore_statistics(self) -> None:
        for name in _STATISTICS[:2]:
            self._norm.get_buffer(name).copy_(self._buffers[name])

    def restore_mode(self) -> None:
        self._norm.training, self._norm.momentum = self._mode
        tracked = _STATISTICS[2]
        self._norm.get_buffer(tracked).copy_(self._buffers[tracked])
