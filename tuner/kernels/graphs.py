"""Formulas that inductor compiles: each once for a dtype, a device and a number of dimensions."""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tuner.kernels.formulas import Formula

_log = logging.getLogger(__name__)

DEVICES = {"cuda"}  # the native kernels are as fast on the CPU, and need no second of compiling
_OPTIONS = {
    "eager_numerics.division_rounding": True,  # without, Triton's division is an approximation
    "eager_numerics.disable_ftz": True,
    "triton.prefer_nd_tiling": True,  # else every value divides its index to find its scale
    "max_autotune_pointwise": True,  # which tiles are best depends on the device
    "assert_indirect_indexing": False,  # the columns of in_groups are our own
    "size_asserts": False,  # Graph.holds has seen to it
}
# whatever a compiler that is missing, too old or too new for this torch ends with
_FAILURES = (
    RuntimeError,
    OSError,
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    AssertionError,
)
_MOST_SHAPES = 4096  # that a graph remembers to hold for

_Key = tuple[object, ...]


class Graph:
    """A compiled formula for all sizes of at least 2; `static_last` fixes the last size.

    This is `torch.compile(dynamic=True, fullgraph=True)` without Dynamo, whose guards take longer
    than a kernel: they are evaluated here once for a set of shapes, not once a call. Sizes that
    happen to be equal are not taken to be so for ever.
    """

    def __init__(self, formula: Formula, tensors: Sequence[Tensor], static_last: bool) -> None:
        # a third of the time that torch itself takes to import, which only accelerators need
        from torch._subclasses import FakeTensorMode  # torch, its compiler's half
        from torch.fx.experimental.proxy_tensor import make_fx  # torch, its compiler's half
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # torch, its compiler's half

        self._shapes = ShapeEnv(duck_shape=False)
        mode = FakeTensorMode(shape_env=self._shapes)
        fakes: list[Any] = [_fake(t, mode, static_last and t.ndim > 1) for t in tensors]
        with torch._C.DisableTorchFunction(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates parts that its compiler uses
            traced = make_fx(formula, tracing_mode="symbolic")(*fakes)
            self._call: Callable[..., object] = torch._inductor.standalone_compile(
                traced,
                fakes,
                dynamic_shapes="from_example_inputs",
                fake_mode=mode,
                options={"config_patches": _OPTIONS},
            )
        self._guards = self._shapes.produce_guards_expression(fakes)
        self._held: dict[object, bool] = {}

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph was compiled for tensors of these shapes, too."""
        shapes = tuple(tensor.shape for tensor in tensors)
        held = self._held.get(shapes)
        if held is None:
            if len(self._held) >= _MOST_SHAPES:
                self._held.clear()
            held = self._held[shapes] = self._evaluate(tensors)
        return held

    def _evaluate(self, tensors: Sequence[Tensor]) -> bool:
        if self._guards is None:
            return True
        return bool(self._shapes.evaluate_guards_expression(self._guards, tensors))

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Compute; the results go to one of the tensors."""
        self._call(*tensors)


def _fake(tensor: Tensor, mode: Any, static_last: bool) -> Tensor:
    from torch.fx.experimental import symbolic_shapes  # torch, its compiler's half

    sizes = [symbolic_shapes.DimDynamic.DYNAMIC] * tensor.ndim
    if static_last:
        sizes[-1] = symbolic_shapes.DimDynamic.STATIC
    context: Any = symbolic_shapes.StatelessSymbolicContext(dynamic_sizes=sizes)
    fake: Tensor = mode.from_tensor(tensor, symbolic_context=context)
    return fake


class Graphs:
    """All graphs of a process: at most one for a formula, dtype, device and `kind` of shapes.

    There are 39 kinds: six layouts of scales for each of five roundings and the backward mask, and
    three of MX. A search needs two (mixed-int) to six (mx, everything) of them.
    """

    def __init__(self) -> None:
        self._graphs: dict[_Key, Graph] = {}
        self._broken: set[str] = set()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._graphs)

    def can_run_on(self, device_type: str) -> bool:
        """Whether nothing is known yet that speaks against it."""
        return device_type in DEVICES and device_type not in self._broken and _is_on()

    def run(
        self, formula: Formula, kind: _Key, tensors: Sequence[Tensor], static_last: bool = False
    ) -> bool:
        """Run a formula, compiled; False where it cannot be compiled, or not for these shapes."""
        key = kind, tensors[0].dtype, tensors[0].device
        graph = self._graphs.get(key)
        if graph is not None:
            if not graph.holds(tensors):
                return False
            graph.run(tensors)
            return True
        with self._lock:
            if key not in self._graphs:
                return self._run_first(formula, key, tensors, static_last)
        return self.run(formula, kind, tensors, static_last)  # another thread was faster

    def _run_first(
        self, formula: Formula, key: _Key, tensors: Sequence[Tensor], static_last: bool
    ) -> bool:
        device = tensors[0].device
        if not self.can_run_on(device.type) or _is_capturing(device):
            return False
        if not self._graphs:
            _log.info(
                "compiling fake-quantization for %s: some seconds for each kind of format, once; "
                "torch keeps the results in its own cache (ACCUTUNE_FUSED=0 switches this off)",
                device.type,
            )
        try:
            graph = Graph(formula, tensors, static_last)
            graph.run(tensors)
        except torch.OutOfMemoryError:
            return False
        except _FAILURES as error:
            self._broken.add(device.type)
            _log.debug("no fused kernels for %s, operations run one by one: %s", device.type, error)
            return False
        self._graphs[key] = graph
        return True


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: nothing can be compiled meanwhile."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _is_on() -> bool:
    if os.environ.get("ACCUTUNE_FUSED") == "0":
        _log.debug("fused kernels are switched off by ACCUTUNE_FUSED=0")
        return False
    return True


GRAPHS = Graphs()
