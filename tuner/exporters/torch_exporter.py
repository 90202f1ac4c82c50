"""The `torch` target: a `.pt2` package that PyTorch runs with integer kernels on CPU."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from tuner.errors import ExportError
from tuner.exporters.agreement import Run, agreement
from tuner.exporters.base import Call, Exporter, ExportRequest
from tuner.exporters.batch_sizes import check_batch
from tuner.exporters.report import ExportReport, Latency, LeftFloat
from tuner.exporters.saturation import advice
from tuner.exporters.staging import CannotWriteError, file_of, writing
from tuner.exporters.timing import latencies
from tuner.exporters.torch_capability import why_not_integer
from tuner.exporters.torch_eager import load_program, saturates, save_program
from tuner.exporters.torch_graph import (
    changed_before,
    eager,
    integer_products,
    overflowing,
    spelled_graph,
)
from tuner.exporters.torch_latency import compiled_baselines, one_thread
from tuner.exporters.torch_layers import layer_agreement
from tuner.exporters.torch_package import (
    compile_package,
    compress_package,
    has_compiler,
    load_package,
)
from tuner.exporters.torch_runtime import alone, loaded, runtime_name
from tuner.exporters.tracing import Traced
from tuner.ops import Op
from tuner.schemes import OpConfig

_SUFFIX = ".pt2"


class TorchExporter(Exporter):
    """Packages a model with AOTInductor: `torch._inductor.aoti_load_package(path)` runs it.

    The file is `path` if that ends in .pt2, else `model.pt2` in the folder `path`. It takes the
    model's tensors in order. It is compiled for the processor that it was made on. Where no C++
    compiler is found, the file is an exported program (`torch.export.load`) instead.

    Args:
        baselines: compile FP32 and BF16 too, to time them beside the package where `batches` are
            asked for; this takes twice as long again as the export.
    """

    target = "torch"
    suffix = _SUFFIX
    _bf16 = False

    def __init__(self, baselines: bool = True) -> None:
        self._baselines = baselines
        self._runs: WeakKeyDictionary[Traced, Run] = WeakKeyDictionary()

    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why the target has no low-precision kernel for an op's choice, None if it has."""
        return why_not_integer(op, config)

    @property
    def saturates(self) -> bool:
        """Whether oneDNN's integer kernels overflow on this CPU."""
        return saturates()

    @property
    def runtime(self) -> str:
        """PyTorch's version, and how its kernels are run: compiled, or one by one."""
        return runtime_name()

    def compiled(self, traced: Traced, batch: int = 1, on_codes: bool = False) -> Call:
        """Return a call that runs a traced model's package on its example; it takes no codes.

        A package is compiled once for all batch sizes. Raises ExportError where it cannot be.
        """
        check_batch(traced, batch)
        inputs = traced.example.with_batch(batch).tensors
        run = self._runs.get(traced)
        if run is None:
            run = self._runs[traced] = loaded(traced, spelled_graph(traced, self._bf16))
        return partial(run, inputs)

    def compiled_alone(self, traced: Traced, on_codes: bool = False) -> Call:
        """Return a call that runs one op; torch.compile makes it, as it is quicker at that."""
        return alone(traced, spelled_graph(traced, self._bf16), on_codes)

    def export(self, request: ExportRequest) -> ExportReport:
        """Write the artifact, check it against the simulation, measure it.

        Raises ExportError where something cannot be traced, compiled or written, or where the
        artifact gives other outputs than the simulation.
        """
        traced, path = request.traced, file_of(request.path, _SUFFIX)
        graph = spelled_graph(traced, self._bf16)
        program = traced.exported(graph)
        is_compiled = has_compiler()
        # the compiler writes the number of threads into the code
        with one_thread(), _folder_to_compile_in(_size(graph)) as folder:
            made = folder / path.name
            (compile_package if is_compiled else save_program)(program, made)
            kernels = _kernels(graph, compress_package(made)) if is_compiled else _NO_COMPILER
            run = checked((load_package if is_compiled else load_program)(made))
            agreed = agreement(traced, run)
            with writing(path):
                shutil.copyfile(made, path)
            layers = layer_agreement(traced, graph)
            latency = self._latency(traced, run, request.batches) if request.batches else ()
        return ExportReport(
            target=self.target,
            files=(path,),
            size_bytes=path.stat().st_size,
            float_size_bytes=_float_size(traced),
            agreement=agreed,
            layers=layers,
            latency=latency,
            left_float=tuple(self._left_float(request)),
            metric=None if request.evaluate is None else request.evaluate(run),
            notes=(kernels, *([_ONE_THREAD] if latency else []), _order(traced)),
        )

    def _latency(self, traced: Traced, run: Run, batches: tuple[int, ...]) -> tuple[Latency, ...]:
        compares = self._baselines and has_compiler()
        baselines = compiled_baselines(traced) if compares else {}
        return latencies(traced, run, eager(traced), batches, baselines)

    def _left_float(self, request: ExportRequest) -> Iterator[LeftFloat]:
        in_float, changed = overflowing(request.traced), changed_before(request.traced)
        for name, op in request.ops.items():
            if not op.by_default or not (op.weights or op.products):
                continue
            config = request.plan.get(name, OpConfig.float())
            reason = self.why_not(op, config)
            if reason is None and config.inputs is not None and name in in_float:
                reason = advice(self.target)
            if reason is None and config.inputs is not None and name in changed:
                reason = "what it reads is changed after it was quantized (padded, for example)"
            if reason is not None:
                yield LeftFloat(name, reason)


class TorchBf16Exporter(TorchExporter):
    """The same, products that stay float being computed in bfloat16.

    What it is timed beside is the model without quantization, as it would be compiled here: BF16.
    """

    target = "torch-bf16"
    _bf16 = True


_ONE_THREAD = "Times are those of one thread; FP32 is PyTorch's, op by op"

_NO_COMPILER = (
    "No C++ compiler was found: the file is an exported program (torch.export.load), which "
    "computes dequantized values in FP32; tuner.exporters.torch_eager runs it with integer kernels"
)


def checked(run: Run) -> Run:
    """Return what runs an artifact and makes sure that it leaves its inputs alone."""

    def call(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        before = [tensor.clone() for tensor in inputs]
        outputs = run(inputs)
        for index, (old, new) in enumerate(zip(before, inputs, strict=True)):
            if not torch.equal(old, new) and not old.isnan().any():
                raise ExportError(f"the artifact overwrites its input {index}")
        return outputs

    return call


@contextmanager
def _folder_to_compile_in(constant_bytes: int) -> Iterator[Path]:
    """Yield a folder among temporary files; raise ExportError where there is no room for a package.

    A package has the constants twice before it is compressed; the compiler aborts the whole process
    where that does not fit. It keeps its own files there, too.
    """
    home = tempfile.gettempdir()
    try:
        with tempfile.TemporaryDirectory(dir=home) as folder:
            if shutil.disk_usage(folder).free < 2 * constant_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield Path(folder)
    except CannotWriteError:
        raise
    except (ExportError, OSError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise ExportError(
            f"PyTorch cannot compile the model: the folder for temporary files, {home!r}, has no "
            "room for what the compiler writes there (some hundred MB, and twice the model). Set "
            "the environment variable TMPDIR to a folder with more room before Python starts"
        ) from error


def _size(graph: fx.GraphModule) -> int:
    return sum(t.numel() * t.element_size() for t in (*graph.parameters(), *graph.buffers()))


def _float_size(traced: Traced) -> int:
    """Return the bytes of the model's constants as they are in FP32, without generated code."""
    graph = traced.module.graph
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    found = [attrgetter(name)(traced.module) for name in used]
    tensors = {x.data_ptr(): x for x in found if isinstance(x, Tensor)}  # tied ones have one place
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _kernels(graph: fx.GraphModule, found: int) -> str:
    expected = integer_products(graph)
    text = f"{found} integer kernels in the compiled code"
    if found < expected:
        text += f", of {expected} products of integers: the rest is computed in FP32"
    return f"{text}; compiled for this processor"


def _order(traced: Traced) -> str:
    return (
        f"The package takes {', '.join(traced.example.names)} and returns "
        f"{', '.join(traced.outputs)}, in this order. It reads contiguous tensors of the types and "
        "fixed lengths that it was exported with, and checks none of that"
    )
