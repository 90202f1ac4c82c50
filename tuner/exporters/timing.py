"""Times of calls: warmed up, several contenders in turns, medians."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from tuner.exporters.agreement import Run
from tuner.exporters.report import Latency
from tuner.exporters.tracing import Traced

_WARM_UP = 3
_BLOCK_ROUNDS = 25
_WINDOW_S = 0.15
_ROW_MS, _LONGEST_ROW = 20, 4


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of the times of a call, in milliseconds."""

    median_ms: float
    lower_ms: float
    upper_ms: float


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    limit_s: float = 20.0,
    warm_up: int = _WARM_UP,
) -> dict[str, Timing]:
    """Time calls in turns, so that a disturbance hits all; stop early at the limit.

    In a round each is called a few times in a row, first untimed: the caches then hold its own
    weights, not another's, as where one model is served. At least three rounds are run, after
    `warm_up` calls of each.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for index in range(max(rounds, 3)):
        if index >= 3 and time.perf_counter() - started > limit_s:
            break
        for name, call in calls.items():
            first = _timed_ms(call)
            again = [_timed_ms(call) for _ in range(_row(first))] if len(calls) > 1 else [first]
            times[name].extend(again)
    return {name: _timing(found) for name, found in times.items()}


def round_ms(times: Iterable[Timing]) -> float:
    """Return how long a round of `interleaved` takes for calls of such times."""
    return sum((1 + _row(timing.median_ms)) * timing.median_ms for timing in times)


def _row(call_ms: float) -> int:
    """Return how many calls in a row are timed."""
    return max(int(_ROW_MS // max(call_ms, _ROW_MS / _LONGEST_ROW)), 1)


def undisturbed_ms(call: Callable[[], object], limit_s: float) -> float:
    """Return the least of the medians of several blocks of calls; of slow calls there is but one.

    25 calls of an op take a few milliseconds, for all of which another process may be in the way.
    """
    medians: list[float] = []
    started = time.perf_counter()
    while not medians or time.perf_counter() - started < _WINDOW_S:
        medians.append(interleaved({"": call}, _BLOCK_ROUNDS, limit_s)[""].median_ms)
    return min(medians)


def latencies(
    traced: Traced,
    quantized: Run,
    reference: Run,
    batches: Iterable[int],
    baselines: Mapping[str, Run] | None = None,
) -> tuple[Latency, ...]:
    """Time artifacts of one model in turns, at each batch size that it takes.

    `reference` is FP32; `baselines` are further artifacts without quantization, by name.
    """
    calls = {"float": reference, "quantized": quantized, **(baselines or {})}
    found = []
    for batch in batches:
        if not takes_batch(traced, batch):
            continue
        inputs = traced.example.with_batch(batch).tensors
        times = interleaved({name: partial(run, inputs) for name, run in calls.items()})
        mine = times["quantized"]
        found.append(
            Latency(
                batch=batch,
                float_ms=times["float"].median_ms,
                quantized_ms=mine.median_ms,
                spread_ms=(mine.lower_ms, mine.upper_ms),
                baselines_ms={name: times[name].median_ms for name in baselines or {}},
            )
        )
    return tuple(found)


def takes_batch(traced: Traced, size: int) -> bool:
    """Whether a traced model runs at a batch size: every batch is free, or that of its example."""
    example = traced.example
    pairs = zip(example.names, example.tensors, example.with_batch(size).tensors, strict=True)
    return all(one.shape == o.shape or 0 in traced.dynamic.get(name, {}) for name, one, o in pairs)


def _timed_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _timing(times: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, lower, upper)
