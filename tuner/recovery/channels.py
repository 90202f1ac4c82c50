"""What calibration keeps of the channels of an activation that may be scaled."""

import torch
from torch import Tensor

from tuner.statistics import TensorStatistics, summarize

_VALUES = 1 << 21
"""How many values are kept of an activation, though at least one position."""


class ChannelStatistics:
    """Exact ranges of the channels in every batch, and a sample of positions with all channels.

    From both follow the statistics of x / s for any factors s `[channels]`: its extremes exactly,
    its distribution from the sample. Positions of all batches in a row are taken at even distances;
    where they become too many, every second one stays, so nothing is left to chance.
    """

    def __init__(self, axis: int, values: int = _VALUES) -> None:
        self._axis = axis
        self._most = values
        self._distance = 1
        self._rows: list[Tensor] = []
        self._seen = 0
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    @property
    def count(self) -> int:
        """The number of batches that had finite values."""
        return len(self._lows)

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and largest value of each channel, both `[channels]`."""
        return torch.stack(self._lows).amin(0), torch.stack(self._highs).amax(0)

    @property
    def magnitudes(self) -> Tensor:
        """The largest magnitude of each channel, `[channels]`."""
        low, high = self.extremes
        return torch.maximum(-low, high).clamp_min(0)

    @property
    def means(self) -> Tensor:
        """The mean magnitude of each channel in the sample, `[channels]`."""
        return torch.cat(self._rows).abs().nan_to_num(0.0, 0.0, 0.0).mean(0)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add one batch `[…, channels at the axis, …]`; NaN and ±inf are left out."""
        x = x.detach()
        if not x.numel():
            return
        others = [i for i in range(x.dim()) if i != self._axis % x.dim()]
        low, high = (_reduced(x, others, end) for end in ("amin", "amax"))
        if not bool(torch.isfinite(low - high).all()):
            finite = torch.isfinite(x)
            low = _reduced(x.masked_fill(~finite, torch.inf), others, "amin")
            high = _reduced(x.masked_fill(~finite, -torch.inf), others, "amax")
        if bool((low > high).all()):
            return
        self._lows.append(low.float().cpu())
        self._highs.append(high.float().cpu())
        self._keep(x.movedim(self._axis, -1))

    def shifted(self, shifts: Tensor) -> "ChannelStatistics":
        """Return the statistics of x − shifts `[channels]`, which are not to be updated."""
        found = ChannelStatistics(self._axis, self._most)
        found._rows = [torch.cat(self._rows) - shifts]
        found._lows = [low - shifts for low in self._lows]
        found._highs = [high - shifts for high in self._highs]
        return found

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
        x = torch.atleast_2d(x)
        positions = x.shape[:-1].numel()
        self._thin(self._seen + positions, x.shape[-1])
        first = -self._seen % self._distance
        picked = torch.arange(min(first, positions), positions, self._distance, device=x.device)
        rows = x[torch.unravel_index(picked, x.shape[:-1])]
        self._rows.append(rows.float().cpu())
        self._seen += positions

    def _thin(self, positions: int, channels: int) -> None:
        """Make the distance fit for so many positions, and leave out what lies between."""
        before, most = self._distance, max(self._most // max(channels, 1), 1)
        while -(-positions // self._distance) > most:
            self._distance *= 2
        if self._rows and self._distance > before:
            self._rows = [torch.cat(self._rows)[:: self._distance // before].clone()]


def _reduced(x: Tensor, axes: list[int], function: str) -> Tensor:
    reduce = torch.amin if function == "amin" else torch.amax
    return reduce(x, axes) if axes else x
