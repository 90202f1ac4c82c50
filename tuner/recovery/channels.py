"""What calibration keeps of the channels of an activation that may be scaled."""

import torch
from torch import Tensor

from tuner.statistics import TensorStatistics, summarize

_VALUES = 1 << 21
"""How many values are kept of an activation; twice as many for a moment."""


class ChannelStatistics:
    """Exact ranges of the channels in every batch, and a sample of positions with all channels.

    From both follow the statistics of x / s for any factors s `[channels]`: its extremes exactly,
    its distribution from the sample. Positions are taken at even distances; where they become too
    many, every second one stays, so the sample spans all batches and nothing is left to chance.
    """

    def __init__(self, axis: int, values: int = _VALUES) -> None:
        self._axis = axis
        self._most = values
        self._distance = 1
        self._rows: list[Tensor] = []
        self._kept = 0
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    @property
    def count(self) -> int:
        """The number of batches that had finite values."""
        return len(self._lows)

    @property
    def magnitudes(self) -> Tensor:
        """The largest magnitude of each channel, `[channels]`."""
        low, high = torch.stack(self._lows).amin(0), torch.stack(self._highs).amax(0)
        return torch.maximum(-low, high).clamp_min(0)

    @property
    def means(self) -> Tensor:
        """The mean magnitude of each channel in the sample, `[channels]`."""
        return torch.cat(self._rows).abs().nan_to_num(0.0, 0.0, 0.0).mean(0)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add one batch `[…, channels at the axis, …]`; NaN and ±inf are left out."""
        x = x.detach()
        others = [i for i in range(x.dim()) if i != self._axis % x.dim()]
        low, high = (_reduced(x, others, end) for end in ("amin", "amax"))
        if not bool(torch.isfinite(low - high).all()):
            finite = torch.isfinite(x)
            low = _reduced(x.masked_fill(~finite, torch.inf), others, "amin")
            high = _reduced(x.masked_fill(~finite, -torch.inf), others, "amax")
        if not x.numel() or bool((low > high).all()):
            return
        self._lows.append(low.float().cpu())
        self._highs.append(high.float().cpu())
        self._keep(x.movedim(self._axis, -1))

    def scaled(self, factors: Tensor) -> TensorStatistics:
        """Return the statistics of x / factors."""
        found = TensorStatistics()
        lows, highs = (torch.stack(ends) / factors for ends in (self._lows, self._highs))
        extremes = torch.cat((lows.amin(0), highs.amax(0)))
        rows = torch.cat(self._rows) / factors
        for values in (rows, extremes[torch.isfinite(extremes)]):
            found.merge(summarize(values))
        ends = zip(lows.amin(1).tolist(), highs.amax(1).tolist(), strict=True)
        found.batch_ranges[:] = list(ends)
        return found

    def _keep(self, x: Tensor) -> None:
        """Keep positions of `[…, channels]`; they are picked before anything is copied."""
        positions = x.shape[:-1].numel()
        picked = torch.arange(0, positions, self._distance, device=x.device)
        where = torch.unravel_index(picked, x.shape[:-1]) if x.dim() > 1 else None
        rows = x[None] if where is None else x[where]
        self._rows.append(rows.float().cpu())
        self._kept += rows.numel()
        while self._kept > self._most and self._longest > 1:
            self._distance *= 2
            self._rows = [kept[::2].clone() for kept in self._rows]
            self._kept = sum(kept.numel() for kept in self._rows)

    @property
    def _longest(self) -> int:
        return max(len(kept) for kept in self._rows)


def _reduced(x: Tensor, axes: list[int], function: str) -> Tensor:
    reduce = torch.amin if function == "amin" else torch.amax
    return reduce(x, axes) if axes else x
