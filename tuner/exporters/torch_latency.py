"""Times of a package beside FP32 and bfloat16 in PyTorch, on one thread."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tuner.exporters.agreement import Run
from tuner.exporters.report import Latency
from tuner.exporters.timing import Timing, interleaved
from tuner.exporters.torch_graph import float_graph
from tuner.exporters.torch_package import compile_package, load_package
from tuner.exporters.tracing import Traced

_EAGER, _COMPILED, _BF16, _QUANTIZED = "FP32 eager", "FP32 compiled", "BF16 compiled", "quantized"


def latencies(
    traced: Traced, run: Run, batches: Sequence[int], compiled: bool
) -> tuple[tuple[Latency, ...], tuple[str, ...]]:
    """Time a package against FP32 eager; `compiled` adds FP32 and BF16 compiled, as notes."""
    eager = float_graph(traced)
    contenders: dict[str, Run] = {_EAGER: lambda inputs: eager(*inputs), _QUANTIZED: run}
    with tempfile.TemporaryDirectory() as folder, one_thread(), torch.no_grad():
        if compiled:
            for name, bf16 in ((_COMPILED, False), (_BF16, True)):
                path = Path(folder) / f"{name.replace(' ', '-')}.pt2"
                compile_package(traced.exported(float_graph(traced, bf16)), path)
                contenders[name] = load_package(path)
        measured = {batch: _timed(contenders, traced, batch) for batch in batches}
    found = tuple(_latency(batch, times) for batch, times in measured.items())
    notes = tuple(_note(batch, times) for batch, times in measured.items()) if compiled else ()
    return found, notes


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(contenders: dict[str, Run], traced: Traced, batch: int) -> dict[str, Timing]:
    inputs = traced.example.with_batch(batch).tensors
    calls = {name: _call(run, inputs) for name, run in contenders.items()}
    return interleaved(calls)


def _call(run: Run, inputs: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: run(inputs)


def _latency(batch: int, times: dict[str, Timing]) -> Latency:
    found = times[_QUANTIZED]
    spread = found.lower_ms, found.upper_ms
    return Latency(batch, times[_EAGER].median_ms, found.median_ms, spread)


def _note(batch: int, times: dict[str, Timing]) -> str:
    compiled, bf16 = times[_COMPILED].median_ms, times[_BF16].median_ms
    return (
        f"Batch {batch}, one thread: FP32 compiled {compiled:.3g} ms, BF16 compiled {bf16:.3g} ms: "
        f"the quantized package is {compiled / times[_QUANTIZED].median_ms:.2f}× and "
        f"{bf16 / times[_QUANTIZED].median_ms:.2f}× as fast"
    )
