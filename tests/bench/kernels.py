"""How long fake-quantization takes, in copies of the same tensor: ours and others'."""

import argparse
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import machine
import tables
import torch
from torch import Tensor

from tuner import PerChannel, TensorScheme, compute_qparams, fake_quantize
from tuner.kernels import masked_gradient
from tuner.kernels.build import library
from tuner.qparams import grid_of
from tuner.statistics import summarize

Call = Callable[[Tensor], object]
_COLUMNS = 1024
_SMALL = 1024  # values, for the overhead of a call
_CUDA_CALLS = 20  # between two events


def ours(x: Tensor) -> Iterator[tuple[str, Call]]:
    """Yield what this package does with static scales, block scales, statistics and gradients."""
    for name in ("int8", "e4m3fn", "e5m2", "bf16"):
        yield name, _static(TensorScheme(format=name), x)
    for name in ("int8", "e4m3fn"):
        per_channel = TensorScheme(format=name, granularity=PerChannel(0))
        yield f"{name} per channel", _static(per_channel, x)
    for name in ("mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "nf4", "abfp8"):
        yield name, _dynamic(TensorScheme(format=name))
    scheme = TensorScheme(format="int8")
    grid, gradient = grid_of(scheme, compute_qparams(x, scheme), x), torch.ones_like(x)
    yield "backward, int8", lambda t: masked_gradient(t, gradient, grid)
    yield "statistics", summarize


def _static(scheme: TensorScheme, x: Tensor) -> Call:
    qparams = compute_qparams(x, scheme)
    return lambda t: fake_quantize(t, scheme, qparams)


def _dynamic(scheme: TensorScheme) -> Call:
    return lambda t: fake_quantize(t, scheme)


def others(x: Tensor) -> Iterator[tuple[str, Call]]:
    """Yield what torch, torchao and brevitas do; those that are not installed are left out."""
    scale = float(x.abs().max()) / 127
    scales = x.abs().amax(1) / 127
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    yield (
        "torch.fake_quantize_per_tensor_affine",
        lambda t: torch.fake_quantize_per_tensor_affine(t, scale, 0, -128, 127),
    )
    yield (
        "torch.fake_quantize_per_channel_affine",
        lambda t: torch.fake_quantize_per_channel_affine(t, scales, zeros, 0, -128, 127),
    )
    yield "torch: to float8_e4m3fn and back", lambda t: t.to(torch.float8_e4m3fn).float()
    yield "MXFP8 in eager torch, as microxcaling does it", mx_by_logarithms
    yield from _torchao()
    yield from _brevitas(scale)


def mx_by_logarithms(x: Tensor) -> Tensor:
    """Return MXFP8 (E4M3) by elementwise logarithms and powers, one torch operation at a time."""
    blocks = x.unflatten(-1, (-1, 32))
    shared = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 8
    scaled = blocks / 2**shared
    exponent = torch.floor(torch.log2(scaled.abs() + (scaled == 0))).clamp(min=-6)
    steps = scaled / 2**exponent * 8
    rounded = torch.sign(steps) * torch.floor(steps.abs() + 0.5) / 8 * 2**exponent
    return (rounded.clamp(-448, 448) * 2**shared).flatten(-2)


def _torchao() -> Iterator[tuple[str, Call]]:
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor  # optional: torchao
    except ImportError:
        return
    yield (
        "torchao MXTensor, MXFP8",
        lambda t: MXTensor.to_mx(t, torch.float8_e4m3fn, 32).dequantize(),
    )


def _brevitas(scale: float) -> Iterator[tuple[str, Call]]:
    try:
        from brevitas.core.function_wrapper import Identity  # optional: brevitas
        from brevitas.core.quant import IntQuant  # optional: brevitas
    except ImportError:
        return
    quantizer = IntQuant(input_view_impl=Identity(), narrow_range=False, signed=True)
    parameters = (torch.tensor(v) for v in (scale, 0.0, 8.0))
    scale_, zero, bits = parameters
    yield "brevitas IntQuant, int8", lambda t: quantizer(scale_, zero, bits, t)


@contextmanager
def without_a_compiler() -> Iterator[None]:
    """Take the path of machines that have no C compiler."""
    with (
        mock.patch("tuner.kernels.grid.takes", return_value=False),
        mock.patch("tuner.kernels.native.takes", return_value=False),
        mock.patch("tuner.kernels.summaries.takes", return_value=False),
    ):
        yield


@contextmanager
def without_fusing() -> Iterator[None]:
    """Run the operations one by one on an accelerator."""
    with mock.patch("tuner.kernels.graphs.DEVICES", frozenset()):
        yield


@torch.no_grad()
def measure(mib: int, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield one raw line for each implementation; medians of repeats that alternate with copies."""
    torch.set_num_threads(threads)
    x = torch.randn(mib * 2**20 // 4 // _COLUMNS, _COLUMNS)
    for owner, calls in (("accutune", ours), ("others", others)):
        for what, call in calls(x):
            yield _line(owner, what, call, x, mib, repeats)
    for what, call in ours(x):
        with without_a_compiler():
            yield _line("accutune without a compiler", what, call, x, mib, repeats)


@torch.no_grad()
def measure_on_cuda(mib: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the same for a CUDA device, against copies on it; statistics are left out."""
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name()
    x = torch.randn(mib * 2**20 // 4 // _COLUMNS, _COLUMNS, device="cuda")
    for owner, calls in (("accutune", ours), ("others", others)):
        for what, call in calls(x):
            if what != "statistics":
                yield _line(f"{owner}, {device}", what, call, x, mib, repeats)
    for what, call in ours(x):
        if what != "statistics":
            with without_fusing():
                yield _line(f"accutune not fused, {device}", what, call, x, mib, repeats)


def _line(owner: str, what: str, call: Call, x: Tensor, mib: int, repeats: int) -> dict[str, Any]:
    small = x.flatten()[:_SMALL].view(1, -1)
    is_small_too = "channel" not in what and "backward" not in what and x.is_cpu
    small_s = _small_seconds(call, small) if is_small_too else None
    target = torch.empty_like(x)
    seconds = _seconds if x.is_cpu else _cuda_seconds
    pairs = [
        (seconds(lambda: target.copy_(x)), seconds(lambda: call(x))) for _ in range(repeats + 2)
    ][2:]
    return {
        "model": "kernels",
        "owner": owner,
        "what": what,
        "mib": mib,
        "threads": torch.get_num_threads(),
        "copy_s": median(copy for copy, _ in pairs),
        "call_s": median(call for _, call in pairs),
        "ratio": median(call / copy for copy, call in pairs),
        "small_s": small_s,
        "machine": machine.describe(),
    }


def _small_seconds(call: Call, small: Tensor) -> float:
    """Return the least mean of 50 calls: what they take when nothing else disturbs them."""
    return min(timeit.repeat(lambda: call(small), number=50, repeat=20)) / 50


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _cuda_seconds(call: Callable[[], object]) -> float:
    """Return the mean of calls in a row, as the device's own clock sees them."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(_CUDA_CALLS):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / _CUDA_CALLS


def main() -> None:
    """Measure what the arguments ask for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, nargs="+", default=(16, 64))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, torch.get_num_threads()))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if library() is None:
        print("there is no C compiler here: the native kernels are not measured")
    for threads in dict.fromkeys(arguments.threads):
        for mib in arguments.mib:
            for line in measure(mib, threads, arguments.repeats):
                tables.append(line, tables.KERNELS)
                print(f"{line['owner']}: {line['what']}: {line['ratio']:.2f}", flush=True)
    for mib in arguments.mib if torch.cuda.is_available() else ():
        for line in measure_on_cuda(mib, arguments.repeats):
            tables.append(line, tables.KERNELS)
            print(f"{line['owner']}: {line['what']}: {line['ratio']:.2f}", flush=True)
    tables.render()


if __name__ == "__main__":
    main()
