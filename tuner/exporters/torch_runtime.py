"""Calls of quantized graphs that can be timed: packages of whole models, ops compiled alone.

A whole model is timed as the package that an export would write. An op alone is compiled by
torch.compile, whose kernels are the same and which takes two seconds instead of ten. Where no C++
compiler is found, oneDNN's integer kernels are called one by one.
"""

import logging
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tuner.errors import ExportError
from tuner.exporters.agreement import Run
from tuner.exporters.base import Call
from tuner.exporters.torch_eager import with_integer_kernels
from tuner.exporters.torch_latency import one_thread
from tuner.exporters.torch_package import (
    compile_freezing,
    compile_package,
    has_compiler,
    load_package,
)
from tuner.exporters.torch_spelling import decomposed
from tuner.exporters.tracing import Traced

_log = logging.getLogger(__name__)
_QUANTIZE = decomposed.quantize_per_tensor.default
_DEQUANTIZE = decomposed.dequantize_per_tensor.default


def runtime_name() -> str:
    """Return PyTorch's version, and whether its kernels are compiled here or called one by one."""
    return f"torch-{torch.__version__}-{'compiled' if has_compiler() else 'eager'}"


def loaded(traced: Traced, graph: fx.GraphModule) -> Run:
    """Return what runs the spelled graph of a traced model, as its package would.

    Raises ExportError where it cannot be exported or compiled.
    """
    if not has_compiler():
        _warn_of_no_compiler()
        return _run_of(with_integer_kernels(graph))
    program = traced.exported(graph)
    # as an export does: the compiler writes the number of threads into the code
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        compile_package(program, path)
        return load_package(path)


@cache
def _warn_of_no_compiler() -> None:
    _log.warning("no C++ compiler was found: times are those of integer kernels, one by one")


def alone(traced: Traced, graph: fx.GraphModule, on_codes: bool = False) -> Call:
    """Return a call of a small spelled graph on the example of its traced model.

    With `on_codes`, it takes and gives codes where its inputs are quantized and its outputs
    dequantized at once. What fails to compile is run by integer kernels one by one, and logged.
    """
    inputs = traced.example.tensors
    if on_codes:
        inputs = _without_ends(graph, inputs)
    inputs = tuple(_as_compiled(tensor) for tensor in inputs)
    if has_compiler():
        try:
            return _without_gradients(compile_freezing(graph, inputs), inputs)
        except ExportError as error:
            _log.warning("%s; it is timed with integer kernels called one by one", error)
    return _without_gradients(with_integer_kernels(graph), inputs)


def _run_of(module: fx.GraphModule) -> Run:
    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return tuple(module(*inputs))

    return run


def _without_gradients(module: Any, inputs: Sequence[Tensor]) -> Call:
    return torch.no_grad()(partial(module, *inputs))


def _as_compiled(tensor: Tensor) -> Tensor:
    """Return images channels last, as compiled convolutions hand them on."""
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _without_ends(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Let a graph take and give codes; return the inputs for that."""
    nodes = graph.graph.find_nodes(op="placeholder")
    found = tuple(_entered(node, x) for node, x in zip(nodes, inputs, strict=True))
    output = graph.graph.output_node()
    values: Any = output.args[0]
    output.args = (tuple(_left(value) for value in values),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return found


def _entered(placeholder: fx.Node, x: Tensor) -> Tensor:
    """Put an input in the place of its codes, where that is all that it is for; return it."""
    if len(placeholder.users) != 1:
        return x
    (user,) = placeholder.users
    if user.target is not _QUANTIZE:
        return x
    user.replace_all_uses_with(placeholder)
    codes: Tensor = _QUANTIZE(x, *user.args[1:])
    user.graph.erase_node(user)
    return codes


def _left(value: fx.Node) -> Any:
    return value.args[0] if value.target is _DEQUANTIZE else value
