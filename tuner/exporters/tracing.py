"""The graph of a quantized model, traced once: what every exporter begins with."""

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, setitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from tuner.errors import ExportError, brief
from tuner.example import Axes, Example, outputs_of
from tuner.exporters.disturbance import Disturbance
from tuner.exporters.markers import MARKER, mark, operand_of
from tuner.model import InstrumentedModel
from tuner.ops import WeightRef
from tuner.packed_tensor import StoredTensor
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme

ONE_AT_A_TIME = threading.RLock()
"""Held while a model is exported: torch.export changes modules of the whole process."""

_COPY = torch.ops.aten.copy_.default
_SUMS = (
    torch.ops.aten.linear,
    torch.ops.aten.addmm,
    torch.ops.aten.mm,
    torch.ops.aten.bmm,
    torch.ops.aten.matmul,
    torch.ops.aten.conv1d,
    torch.ops.aten.conv2d,
    torch.ops.aten.conv3d,
    torch.ops.aten.conv_transpose1d,
    torch.ops.aten.conv_transpose2d,
    torch.ops.aten.conv_transpose3d,
    torch.ops.aten.scaled_dot_product_attention,
)


@dataclass(frozen=True, eq=False)
class TracedWeight:
    """A quantized weight of the graph: the nodes that yield it, and the parts that it is made of.

    `parts` are what `packed_tensor.pack_tensor` gives; the nodes yield `values`, its floats as they
    are simulated, a view of the graph's constant. `ops` are the names of the ops that use it.
    """

    ref: WeightRef
    scheme: TensorScheme
    parts: StoredTensor
    values: Tensor
    shape: tuple[int, ...]
    ops: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Traced:
    """A quantized model as a graph of ATen ops over flat tensors.

    `module` takes the tensors of `example` in order, and returns a tuple of tensors, named
    `outputs`. Where an activation is fake-quantized it has a call of `markers.MARKER`, whose key
    leads to the quantizer in `quantizers`. Weights are constants with their simulated values.
    `dynamic` are the axes of inputs whose length may change.
    """

    module: fx.GraphModule
    example: Example
    outputs: tuple[str, ...]
    quantizers: Mapping[str, Quantizer]
    weights: tuple[TracedWeight, ...]
    dynamic: Mapping[str, Mapping[int, str]]

    def markers(self) -> Iterator[tuple[fx.Node, str]]:
        """Yield the nodes that stand for quantizers, with their keys, in order of execution."""
        for node in self.module.graph.nodes:
            if is_marker(node):
                yield node, str(node.args[1])

    @torch.no_grad()
    def exported(self, module: fx.GraphModule) -> ExportedProgram:
        """Export a graph over the inputs of this one, with the same axes free.

        Raises ExportError where something in it depends on values of tensors, or on their lengths.
        """
        shapes = _shapes(self.example, self.dynamic, Dim.DYNAMIC)
        tensors = self.example.tensors_to_trace()
        try:
            with ONE_AT_A_TIME, warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch copies specs it deprecated
                return export(module, tensors, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever cannot be traced
            raise ExportError(
                f"torch.export cannot trace the quantized graph: {brief(error)}. "
                "Dynamic activations can be exported with calibration='minmax' only"
            ) from error

    @torch.no_grad()
    def simulate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph with every marker computed by its quantizer."""
        return self.simulation().run(*inputs)  # type: ignore[no-any-return]

    def simulation(self, noise: float = 0.0, seed: int = 0) -> "Simulation":
        """Return what runs the graph, and keeps what reached each marker.

        `noise` is a relative disturbance of what is quantized, and of sums of products of what is
        not, normally distributed.
        """
        return Simulation(self, noise, seed)


class Simulation(fx.Interpreter):
    """Runs a traced graph; `reached` has the tensor that came to each marker, by node name."""

    def __init__(self, traced: Traced, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__(traced.module)
        self._quantizers = traced.quantizers
        self._disturb = Disturbance(noise, seed) if noise else None
        self.reached: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, a marker as its quantizer."""
        if not is_marker(n):
            found = super().run_node(n)
            return found if self._disturb is None or not _sums_floats(n) else self._disturb(found)
        (x, key), _ = self.fetch_args_kwargs_from_env(n)
        self.reached[n.name] = x
        return self._quantizers[key](x if self._disturb is None else self._disturb(x))


def copied_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module with a graph of its own over the same constants; nodes keep their names."""
    graph = fx.Graph()
    found = graph.graph_copy(module.graph, {}, return_output_node=True)
    assert isinstance(found, tuple)
    values, output = found
    graph.output(values).meta = copy.copy(output.meta)
    graph.set_codegen(copy.copy(module.graph._codegen))
    return fx.GraphModule(module, graph)


def _sums_floats(node: fx.Node) -> bool:
    """Whether a node sums products of what no quantizer has rounded."""
    is_sum = getattr(node.target, "overloadpacket", None) in _SUMS
    return is_sum and not any(map(is_marker, node.all_input_nodes))


def is_marker(node: fx.Node) -> bool:
    """Whether a node stands for a quantizer."""
    return node.op == "call_function" and node.target is MARKER


class _Flat(nn.Module):
    """A model that takes the tensors of an example one after the other, and returns a tuple."""

    def __init__(
        self, model: nn.Module, example: Example, tell: Callable[[Iterable[str]], None]
    ) -> None:
        super().__init__()
        self.model = model
        self._example = example
        self._tell = tell

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._example.call(inputs)
        names, tensors = outputs_of(self.model(*args, **kwargs))
        self._tell(names)
        return tensors


def trace(model: InstrumentedModel, example: Example, dynamic_axes: Axes | None = None) -> Traced:
    """Return the graph of a model with the plan that is on it; the model is left as it is.

    Raises ExportError where torch.export cannot trace the model, where the example does not reach
    an op of the plan, or where an axis of `dynamic_axes` cannot change.
    """
    wanted = example.dynamic_axes(dynamic_axes)
    twin = model.copy()
    quantizers = mark(twin)
    outputs: list[str] = []
    tell = partial(setitem, outputs, slice(None))
    flat = _Flat(twin.model, example, tell).eval()
    try:
        with ONE_AT_A_TIME:
            program = _exported(flat, example, wanted)
    except ExportError as error:
        simulated = _Flat(model.copy().model, example, lambda names: None).eval()
        with torch.no_grad():
            why = example.why_no_batch(simulated)
        if why is None:
            raise
        raise ExportError(why) from error
    dynamic = _free_axes(program, example, wanted, dynamic_axes is not None)
    graph = functional(program)
    _name_apart(graph, example.names)
    _check_reached(graph, quantizers)
    weights = tuple(_weights(twin, graph))
    names = told_apart(outputs, example.names)
    return Traced(graph, example, names, quantizers, weights, dynamic)


def _name_apart(graph: fx.GraphModule, inputs: Iterable[str]) -> None:
    """Rename nodes that are called like an input: artifacts know both by their names."""
    names = set(inputs)
    for node in graph.graph.nodes:
        if node.op != "placeholder" and node.name in names:
            node._rename(f"{node.name}_within")
    graph.recompile()


def functional(program: ExportedProgram) -> fx.GraphModule:
    """Return a program's graph without ops that work in place.

    What it does to its inputs and buffers is left out: an artifact keeps no state.
    """
    is_functional = not any(_is_mutable(node) for node in program.graph.nodes)
    if not is_functional:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies specs that it deprecated
            program = program.run_decompositions({})
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    if not is_functional:
        for node in graph.graph.find_nodes(op="call_function", target=_COPY):
            graph.graph.erase_node(node)
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return graph


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def told_apart(outputs: Iterable[str], inputs: Iterable[str]) -> tuple[str, ...]:
    """Return the names of outputs, those that an input has with `_out` behind: files want that."""
    taken = set(inputs)
    return tuple(f"{name}_out" if name in taken else name for name in outputs)


def _exported(
    flat: nn.Module, example: Example, dynamic: Mapping[str, Mapping[int, str]]
) -> ExportedProgram:
    tensors = example.tensors_to_trace()
    shapes = _shapes(example, dynamic, Dim.AUTO)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # recurrent layers keep their weights in a list beside their parameters
            warnings.filterwarnings("ignore", message=".*_flat_weights", category=UserWarning)
            return export(flat, tensors, dynamic_shapes={"inputs": shapes}, strict=False)
    except Exception as error:  # whatever the user's code raises under tracing
        raise ExportError(
            f"torch.export cannot trace this model: {brief(error)}. What leads to "
            "branches that depend on values of tensors must be changed in the model for an export"
        ) from error


def _shapes(
    example: Example, dynamic: Mapping[str, Mapping[int, str]], length: Any
) -> tuple[dict[int, Any], ...]:
    """Return what torch.export takes as dynamic_shapes, input by input."""
    return tuple(dict.fromkeys(dynamic.get(name, {}), length) for name in example.names)


def _free_axes(
    program: ExportedProgram,
    example: Example,
    wanted: Mapping[str, Mapping[int, str]],
    is_asked: bool,
) -> dict[str, dict[int, str]]:
    """Return the axes that did come out free; raises ExportError where one was asked for."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    free: dict[str, dict[int, str]] = {}
    for name, placeholder in zip(example.names, names, strict=True):
        shape = nodes[str(placeholder)].meta["val"].shape
        axes = wanted.get(name, {})
        free[name] = {a: axes[a] for a in axes if _is_free(shape[a])}
        fixed = [a for a in axes if a not in free[name]]
        if fixed and is_asked:
            raise ExportError(
                f"dynamic_axes: the model computes with axis {fixed[0]} of {name} as the constant "
                f"{shape[fixed[0]]}: leave it out, or mend the model (len(t) and int(…) make "
                "constants, t.shape does not)"
            )
    return free


def _is_free(length: int | torch.SymInt) -> bool:
    return not isinstance(length, int) and not length.node.expr.is_number


def _check_reached(graph: fx.GraphModule, quantizers: Mapping[str, Quantizer]) -> None:
    reached = {str(node.args[1]) for node in graph.graph.nodes if is_marker(node)}
    missing = [key for key in quantizers if key not in reached]
    if missing:
        op, _ = operand_of(missing[0])
        raise ExportError(
            f"the example does not reach {op!r}, which the plan quantizes ({len(missing)} of "
            f"{len(quantizers)} quantizers): give example_inputs that take the way of the "
            "calibration data"
        )


def _weights(model: InstrumentedModel, graph: fx.GraphModule) -> Iterator[TracedWeight]:
    """Yield every quantized weight once, tied ones too."""
    users: dict[Any, list[str]] = {}
    refs: dict[Any, WeightRef] = {}
    for name, op in model.ops.items():
        for ref in op.weights:
            if model.weights.scheme(ref) is not None:
                users.setdefault(ref.key, []).append(name)
                refs.setdefault(ref.key, ref)
    parameters = dict(model.model.named_parameters())
    constants = [node for node in graph.graph.nodes if node.op == "get_attr"]
    for key, ref in refs.items():
        parameter = parameters[ref.path]
        nodes = [n for n in constants if _is_same(attrgetter(str(n.target))(graph), parameter)]
        if ref.rows is not None:
            nodes = [user for node in nodes for user in node.users if _is_run(user, ref.rows)]
        scheme = model.weights.scheme(ref)
        assert scheme is not None
        yield TracedWeight(
            ref=ref,
            scheme=scheme,
            parts=model.weights.stored(ref),
            values=ref.of(parameter),
            shape=tuple(ref.of(parameter).shape),
            ops=tuple(users[key]),
            nodes=tuple(node.name for node in nodes),
        )


def _is_same(value: Any, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.data_ptr() == parameter.data_ptr()
        and value.shape == parameter.shape
    )


def _is_run(node: fx.Node, rows: tuple[int, int]) -> bool:
    """Whether a node cuts these rows out of a parameter, aten.slice(x, dim=0, start, end)."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    arguments: list[Any] = [*node.args, *(None, 0, None, None)[len(node.args) :]]
    source, axis, start, stop = arguments[:4]
    length = int(source.meta["val"].shape[0])
    last = length if stop is None else min(int(stop), length)
    return bool(axis == 0 and (start or 0, last) == rows)
