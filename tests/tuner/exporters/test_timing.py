"""Artifacts are timed in turns, at the batch sizes that they take."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from tuner.example import Example
from tuner.exporters.report import ExportReport, Latency
from tuner.exporters.timing import interleaved, latencies, takes_batch, undisturbed_ms
from tuner.exporters.tracing import Traced, trace
from tuner.model import InstrumentedModel


class _Reshaped(nn.Module):
    """Computes with its batch as a constant where `size` is given."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self._size = size

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self._size is None else x.view(self._size, -1) * 2


def traced(size: int | None) -> Traced:
    model, x = InstrumentedModel(_Reshaped(size)), torch.zeros(4, 3)
    return trace(model, Example.of_batch(model.model, x))


class _Recorder:
    """An artifact that keeps the sizes that it was called with, and takes its time."""

    def __init__(self, work: int) -> None:
        self._square = torch.ones(work, work)
        self.sizes: set[int] = set()

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        self.sizes.add(len(inputs[0]))
        return (self._square @ self._square,)


def test_each_batch_has_its_row_with_all_contenders() -> None:
    slow, quick, baseline = _Recorder(512), _Recorder(1), _Recorder(1)
    rows = latencies(traced(None), quick, slow, (1, 8), {"BF16 compiled": baseline})
    assert [row.batch for row in rows] == [1, 8]
    assert slow.sizes == quick.sizes == baseline.sizes == {1, 8}
    for row in rows:
        assert row.float_ms > 0
        assert row.spread_ms[0] <= row.quantized_ms <= row.spread_ms[1]
        assert set(row.baselines_ms) == {"BF16 compiled"}
    report = ExportReport("torch", (), 1, 4, None, latency=rows)
    assert report.to_dict()["latency"][0]["baselines_ms"] == dict(rows[0].baselines_ms)
    assert "BF16 compiled" in report.summary()


def test_an_artifact_slower_than_fp32_is_told_how_to_get_a_faster_one() -> None:
    rows = tuple(
        Latency(batch, float_ms=1.0, quantized_ms=1.5, spread_ms=(1, 2)) for batch in (1, 8)
    )
    slower = ExportReport("onnx", (), 1, 4, None, latency=rows)
    assert 'objective="latency"' in slower.summary()
    mixed = replace(slower, latency=(rows[0], replace(rows[1], quantized_ms=0.5)))
    assert "objective" not in mixed.summary()
    assert "objective" not in replace(slower, latency=()).summary()


def test_a_batch_that_is_a_constant_is_timed_alone() -> None:
    fixed, run = traced(4), _Recorder(1)
    assert takes_batch(fixed, 4)
    assert not takes_batch(fixed, 8)
    assert [row.batch for row in latencies(fixed, run, run, (1, 4, 8))] == [4]


class _Table(nn.Module):
    """Looks vectors up in a table of eight that it is given: its length is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self._layer = nn.Linear(8, 2)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self._layer(x @ table.T)


def test_an_input_as_long_as_the_batch_that_is_none_keeps_the_model_from_other_batches() -> None:
    model, table = InstrumentedModel(_Table()), torch.zeros(8, 3)
    found = trace(model, Example.of_batch(model.model, (torch.zeros(8, 3), table)))
    assert [sorted(axes) for axes in found.dynamic.values()] == [[0], []]
    assert takes_batch(found, 8)
    assert not takes_batch(found, 1)
    alone = trace(model, Example.of_batch(model.model, (torch.zeros(1, 3), table)))
    assert takes_batch(alone, 1)


def test_what_another_call_leaves_in_the_caches_counts_for_nothing() -> None:
    last = ""

    def call(name: str) -> None:
        nonlocal last
        if last != name:
            time.sleep(0.005)
        last = name

    times = interleaved({name: partial(call, name) for name in ("one", "other")})
    assert all(timing.upper_ms < 2 for timing in times.values())


def test_a_disturbance_of_some_milliseconds_counts_for_nothing() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls < 40:
            time.sleep(0.002)

    assert undisturbed_ms(call, limit_s=1.5) < 1


def test_a_slow_call_is_timed_in_one_block_within_the_limit() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.06)

    assert undisturbed_ms(call, limit_s=0.1) >= 60
    assert calls <= 3 + 3
