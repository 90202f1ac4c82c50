"""The op graph of one forward, recorded by running the model: nothing is traced."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tuner.ops import CallFacts, Op, WeightRef
from tuner.sites import Call, Site
from tuner.tensors import tensors_in


@dataclass(frozen=True)
class Node:
    """One torch function call, or one call of an op, of the recorded forward.

    `inputs` are the indices of the nodes whose outputs it took, in the order of its tensor
    arguments; −1 stands for a tensor from outside: a model input, a parameter, a buffer.
    """

    index: int
    function: str
    scope: str
    op: str | None
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class OpGraph:
    """What one forward did: its ops in execution order, and who produced what for whom.

    `uncovered` maps the calls that cannot be quantized to their MACs per sample; `unreached` are
    modules that could be quantized, but were never called; `outputs` are the nodes that the model
    returned.
    """

    ops: Mapping[str, Op]
    nodes: tuple[Node, ...] = ()
    outputs: tuple[int, ...] = ()
    uncovered: Mapping[str, int] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()

    def consumers(self, index: int) -> tuple[Node, ...]:
        """Return the nodes that took this node's output."""
        return tuple(node for node in self.nodes if index in node.inputs)

    @property
    def macs(self) -> int:
        """All multiply-accumulates of one sample."""
        return sum(op.macs for op in self.ops.values()) + sum(self.uncovered.values())


class Recorder:
    """A tap that records ops and nodes while the model runs on a batch."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(p): name for name, p in model.named_parameters()}
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._producers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._nodes: list[Node] = []
        self._ops: dict[str, Op] = {}
        self.uncovered: dict[str, int] = {}
        self.label: str | None = "(outside the model)"

    def run(self, site: Site, call: Call) -> Any:
        """Record one call of an op."""
        operands: dict[int, Tensor] = {}

        def look(index: int, x: Tensor) -> Tensor:
            operands[index] = x
            return x

        before, self.label = self.label, None
        try:
            output = call.invoke(look)
        finally:
            self.label = before
        site.calls += 1
        path = site.name.rpartition("/")[0] if call.module is None else site.name
        inputs = tuple(self._producer(operands[i]) for i in sorted(operands))
        self._add(call.family.op_type, path, site.name, inputs, output)
        self._record_op(site.name, call, operands, output)
        return output

    def other(self, scope: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record one torch function call that is no op."""
        name = getattr(fn, "__name__", str(fn))
        inputs = tuple(self._producer(t) for t in tensors_in((args, kwargs)))
        before, self.label = self.label, f"{scope}/{name}"
        try:
            output = fn(*args, **kwargs)
        finally:
            self.label = before
        if name == "__setitem__" and isinstance(args[0], Tensor):
            self._add(name, scope, None, inputs, args[0])
        elif next(tensors_in(output), None) is not None:
            self._add(name, scope, None, inputs, output)
        return output

    def graph(self, output: Any, samples: int) -> OpGraph:
        """Return what was recorded, MACs divided by the samples of the batch."""
        ops = _without_overlaps(self._ops, self._shapes)
        per_sample = {name: _per_sample(op, samples) for name, op in ops.items()}
        outputs = tuple(self._producer(t) for t in tensors_in(output))
        uncovered = {name: round(macs / samples) for name, macs in self.uncovered.items() if macs}
        return OpGraph(per_sample, tuple(self._nodes), outputs, uncovered)

    def _producer(self, tensor: Tensor) -> int:
        reference, index = self._producers.get(id(tensor), (None, -1))
        return index if reference is not None and reference() is tensor else -1

    def _add(
        self, function: str, scope: str, op: str | None, inputs: tuple[int, ...], output: Any
    ) -> None:
        index = len(self._nodes)
        self._nodes.append(Node(index, function, scope, op, inputs))
        for tensor in tensors_in(output):
            self._producers[id(tensor)] = (weakref.ref(tensor), index)

    def _record_op(self, name: str, call: Call, operands: dict[int, Tensor], output: Any) -> None:
        refs = self._steady_weights(name, call, operands)
        weights = tuple(refs.values()) or self._module_weights(call)
        activations = tuple(i for i in sorted(operands) if i not in refs)
        facts = CallFacts(operands, call.module, call.args, output)
        op = Op(
            name=name,
            type=call.family.op_type,
            weights=weights,
            activations=activations,
            products=call.family.products(facts),
            input_shapes=tuple(tuple(operands[i].shape) for i in activations),
            output_shape=tuple(next(tensors_in(output)).shape),
            parameters=self._count(weights, call),
            by_default=call.family.by_default,
        )
        self._ops[name] = _merged(self._ops[name], op) if name in self._ops else op

    def _module_weights(self, call: Call) -> tuple[WeightRef, ...]:
        if call.module is None:
            return ()
        axis = call.family.channel_axis
        names = call.family.weight_names(call.module)
        parameters = (call.module.get_parameter(name) for name in names)
        return tuple(WeightRef(self._paths[id(p)], axis) for p in parameters)

    def _steady_weights(
        self, name: str, call: Call, operands: dict[int, Tensor]
    ) -> dict[int, WeightRef]:
        """Return the weight of a functional call, none where another call of it took another."""
        refs = self._operand_weights(call, operands)
        known = self._ops.get(name)
        is_steady = known is None or known.weights == tuple(refs.values())
        return refs if is_steady or call.module is not None else {}

    def _operand_weights(self, call: Call, operands: dict[int, Tensor]) -> dict[int, WeightRef]:
        """Return the one operand of a functional call that is a parameter, the last if several."""
        if call.module is not None or not call.family.by_default:
            return {}
        for index in sorted(operands, reverse=True):
            axis = call.family.weight_axis(index, call.args)
            ref = None if axis is None else self._weight_ref(operands[index], axis)
            if ref is not None:
                return {index: replace(ref, operand=index)}
        return {}

    def _weight_ref(self, tensor: Tensor, axis: int) -> WeightRef | None:
        """Recognise a parameter, its transpose, or a run of its rows."""
        axis = axis % max(tensor.dim(), 1)
        if id(tensor) in self._paths:
            return WeightRef(self._paths[id(tensor)], axis)
        base = tensor._base
        if base is None or id(base) not in self._paths or not base.is_contiguous():
            return None
        path = self._paths[id(base)]
        if tensor.dim() == 2 and tensor.shape == base.shape[::-1] and tensor.T.is_contiguous():
            return WeightRef(path, 1 - axis, transposed=True)
        row = base.stride(0) if base.dim() else 0
        if row and tensor.shape[1:] == base.shape[1:] and tensor.stride() == base.stride():
            start = tensor.storage_offset() // row
            return WeightRef(path, axis, (start, start + tensor.shape[0]))
        return None

    def _count(self, weights: tuple[WeightRef, ...], call: Call) -> int:
        if call.module is not None:
            return sum(p.numel() for p in call.module.parameters(recurse=False))
        return sum(weight_elements(ref, self._shapes[ref.path]) for ref in weights)


def _without_overlaps(ops: Mapping[str, Op], shapes: Mapping[str, torch.Size]) -> dict[str, Op]:
    """Take runs of rows that overlap with another use of the parameter for activations."""
    uses = {ref.key for op in ops.values() for ref in op.weights}
    return {
        name: _as_activation(op, shapes) if any(_overlaps(ref, uses) for ref in op.weights) else op
        for name, op in ops.items()
    }


def _overlaps(ref: WeightRef, uses: set[tuple[str, tuple[int, int] | None]]) -> bool:
    if ref.rows is None:
        return False
    others = (rows for path, rows in uses if path == ref.path and rows != ref.rows)
    return any(r is None or (r[0] < ref.rows[1] and ref.rows[0] < r[1]) for r in others)


def _as_activation(op: Op, shapes: Mapping[str, torch.Size]) -> Op:
    known = dict(zip(op.activations, op.input_shapes, strict=True))
    for ref in op.weights:
        if ref.operand is not None and ref.rows is not None:
            known[ref.operand] = (ref.rows[1] - ref.rows[0], *shapes[ref.path][1:])
    order = tuple(sorted(known))
    return replace(op, weights=(), activations=order, input_shapes=tuple(known[i] for i in order))


def weight_elements(ref: WeightRef, shape: torch.Size) -> int:
    """Return how many elements of a parameter of this shape the reference covers."""
    if ref.rows is None:
        return shape.numel()
    return shape[1:].numel() * (ref.rows[1] - ref.rows[0])


def _merged(first: Op, again: Op) -> Op:
    """Add the MACs of a further call of the same op, which has no weight where that changed."""
    op = first if first.weights == again.weights else again
    if len(first.products) != len(again.products):
        return op
    pairs = zip(op.products, first.products, again.products, strict=True)
    return replace(op, products=tuple(replace(p, macs=a.macs + b.macs) for p, a, b in pairs))


def _per_sample(op: Op, samples: int) -> Op:
    products = (replace(p, macs=round(p.macs / samples)) for p in op.products)
    return replace(op, products=tuple(products))


_VECTOR_OPERAND = {torch.ops.aten.mv: 0, torch.ops.aten.dot: 0, torch.ops.aten.addmv: 1}
"""Products with a vector, which torch's own registry leaves out: the operand with all factors."""


def _macs(packet: Any, args: Any, kwargs: Any, output: Any) -> int:
    if packet in _VECTOR_OPERAND:
        return int(args[_VECTOR_OPERAND[packet]].numel())
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=output)) // 2


class MacCounter(TorchDispatchMode):
    """Counts the MACs of calls that are no ops, under the recorder's current label."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        label = self._recorder.label
        macs = 0 if label is None else _macs(func._overloadpacket, args, kwargs or {}, output)
        if macs and label is not None:
            seen = self._recorder.uncovered
            seen[label] = seen.get(label, 0) + macs
        return output
