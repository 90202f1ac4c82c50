"""Times of one call: warmed up, several contenders in turns, medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of the times of a call, in milliseconds."""

    median_ms: float
    lower_ms: float
    upper_ms: float


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int = 15, limit_s: float = 20.0
) -> dict[str, Timing]:
    """Time every call once a round, so that a disturbance hits all; stop early at the limit.

    At least three rounds are run.
    """
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for index in range(max(rounds, 3)):
        if index >= 3 and time.perf_counter() - started > limit_s:
            break
        for name, call in calls.items():
            times[name].append(_timed_ms(call))
    return {name: _timing(found) for name, found in times.items()}


def _timed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _timing(times: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, lower, upper)
