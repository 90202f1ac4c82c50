"""A histogram whose range grows by merging pairs of bins, so that its counts stay exact."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 4096

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in 4096 bins on `[−2^exponent, 2^exponent)`.

    Bin `i` holds `floor(x / width) = i − 2048`. The widths are powers of two, therefore the counts
    do not depend on the order of what was added, nor on how it was split into batches.
    """

    exponent: int
    counts: Counts

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0**self.exponent / (BINS // 2)

    @property
    def edges(self) -> NDArray[np.float64]:
        """The 4097 edges of the bins."""
        end = 2.0**self.exponent
        return np.linspace(-end, end, BINS + 1)

    @property
    def magnitudes(self) -> Counts:
        """The counts of `|x|` in 2048 bins on `[0, 2^exponent]`."""
        half = BINS // 2
        return self.counts[half:] + self.counts[:half][::-1]

    def grown(self, exponent: int) -> "Histogram":
        """Return the same counts on `±2^exponent`, a range that is no smaller."""
        steps = min(exponent - self.exponent, BINS.bit_length())
        if steps <= 0:
            return self
        target = (np.arange(BINS) - BINS // 2 >> steps) + BINS // 2
        counts = np.zeros(BINS, dtype=np.int64)
        np.add.at(counts, target, self.counts)
        return Histogram(exponent, counts)

    def merged(self, other: "Histogram") -> "Histogram":
        """Return the sum of both on the larger of their ranges."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(exponent, self.grown(exponent).counts + other.grown(exponent).counts)
