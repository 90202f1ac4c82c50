"""The graph of the target `integer`: ATen nodes in JSON, integer arithmetic where it can be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tuner.errors import ExportError
from tuner.exporters.integer_constants import (
    as_array,
    constants_of,
    functional,
    weights_of,
    without_followers,
)
from tuner.exporters.integer_functions import FUNCTIONS
from tuner.exporters.integer_known import (
    Known,
    known_activation,
    known_weight,
    weight_integers,
    why_no_activation,
    why_no_weight,
)
from tuner.exporters.integer_operations import Operation, layer, matmul
from tuner.exporters.integer_quantizers import Chain, chain_to, quantize_node, requantize_node
from tuner.exporters.integer_shapes import MOVES, NUMBERS
from tuner.exporters.integer_values import Array
from tuner.exporters.markers import operand_of
from tuner.exporters.tracing import Traced, is_marker
from tuner.plan import Plan

_LAYERS = {
    "linear": "linear",
    **{f"conv{d}d": "conv" for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": "conv_transpose" for d in (1, 2, 3)},
}
_PRODUCTS = ("matmul", "mm", "bmm")
_LEFT_OUT = ("device", "layout", "pin_memory", "memory_format", "generator", "non_blocking", "copy")


@dataclass(eq=False)
class Document:
    """What is written: nodes and tensors; `done` are ops in integers, `left` why others are not.

    `quantizers` are the names of the nodes that quantize, in the order of the traced markers.
    """

    nodes: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)
    quantizers: list[str] = field(default_factory=list)


class GraphWriter:
    """Writes a traced graph node by node; raises ExportError for what the runner cannot run."""

    def __init__(self, traced: Traced, plan: Plan) -> None:
        self._traced = traced
        self._plan = plan
        self._graph = functional(traced)
        constants = constants_of(self._graph)
        self._weights = weights_of(traced, constants)
        self._constants = without_followers(constants, self._weights)
        self._known: dict[fx.Node, Known] = {}
        self._written: set[fx.Node] = set()
        self.document = Document()

    def write(self) -> Document:
        """Return the document."""
        nodes = list(self._graph.graph.nodes)
        self._check(nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        for node in nodes:
            if node.op == "placeholder":
                self._add(node.name, "input", index=inputs.index(node))
            elif node.op == "output":
                self.document.outputs = [self._reference(n)["node"] for n in node.args[0]]
            elif node.op == "call_function" and node not in self._constants:
                self._call(node)
        _drop_unused(self.document)
        return self.document

    def _check(self, nodes: list[fx.Node]) -> None:
        calls = [n for n in nodes if n.op == "call_function" and n not in self._constants]
        unknown = sorted({name for n in calls if n.users and (name := _unknown(n))})
        if unknown:
            raise ExportError(
                f"target integer: its runner does not know {', '.join(unknown)}. Replace these "
                "ops in the model, or enter them in integer_functions.FUNCTIONS"
            )
        quantizers = self._traced.quantizers
        bad = {k: why for k, q in quantizers.items() if (why := why_no_activation(q.scheme))}
        if bad:
            ops = ", ".join(dict.fromkeys(operand_of(key)[0] for key in bad))
            raise ExportError(
                f"target integer: {next(iter(bad.values()))}, which the plan has for inputs or "
                f"outputs of {ops}: choose intN or uintN there, or leave these ops float"
            )

    def _call(self, node: fx.Node) -> None:
        name = name_of(node)
        if is_marker(node):
            self._quantizer(node)
        elif not self._is_integer(node, name):
            self._plain(node, name)

    def _is_integer(self, node: fx.Node, name: str) -> bool:
        """Write a layer or a product in integers, and say whether that could be."""
        if name in _LAYERS:
            return self._is_layer(node, _LAYERS[name])
        return name in _PRODUCTS and self._is_product(node)

    def _plain(self, node: fx.Node, name: str) -> None:
        args = arguments(node)
        space = "python" if _is_python(node) else "aten"
        self._add(node.name, f"{space}.{name}", args=self._encoded(args))
        first = next(iter(args.values()), None)
        known = self._known_of(first)
        if known is None:
            return
        if name == "embedding" and isinstance(first, fx.Node) and first in self._weights:
            self.document.done.update(self._weights[first].ops)
        elif name in MOVES and space == "aten":
            rest = {k: v for k, v in list(args.items())[1:] if v is not None}
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                moved = known.moved(MOVES[name], name, rest, value.ndim)
                if moved is not None:
                    self._known[node] = moved

    def _quantizer(self, node: fx.Node) -> None:
        source, key = node.args
        assert isinstance(source, fx.Node)
        quantizer = self._traced.quantizers[str(key)]
        known = known_activation(operand_of(str(key))[0], quantizer, node.meta["val"].ndim)
        self._known[node] = known
        self.document.quantizers.append(node.name)
        chain = chain_to(source, self._known, self._constants) if known.is_one_scale else None
        if chain is None:
            fields = quantize_node(node.name, quantizer, node.meta["val"].ndim)
            self.document.tensors |= fields.tensors
            args = {"x": self._reference(source)}
            self._add(node.name, "integer.quantize", args=args, quantizer=str(key), **fields.node)
        else:
            self._requantized(node, str(key), chain)

    def _requantized(self, node: fx.Node, key: str, chain: Chain) -> None:
        """Requantize the integers at the root of a chain, and move the codes as they were moved."""
        quantizer = self._traced.quantizers[key]
        name = f"{node.name}__codes" if chain.moves else node.name
        fields = requantize_node(name, quantizer, self._known[chain.root], chain)
        self.document.tensors |= fields.tensors
        marks = {} if chain.moves else {"quantizer": key}
        args = {"x": self._reference(chain.root)}
        self._add(name, "integer.requantize", args=args, **marks, **fields.node)
        for index, move in enumerate(chain.moves, 1):
            is_last = index == len(chain.moves)
            given = arguments(move)
            encoded = self._encoded(dict(list(given.items())[1:]))
            args = {next(iter(given)): {"node": name}, **encoded}
            name = node.name if is_last else f"{node.name}__{index}"
            space = "python" if _is_python(move) else "aten"
            marks = {"quantizer": key} if is_last else {}
            self._add(name, f"{space}.{name_of(move)}", args=args, **marks)

    def _is_layer(self, node: fx.Node, kind: str) -> bool:
        """Write a Linear or a convolution in integers, and say so; else note why not."""
        args = _defaults(node) | arguments(node)
        x, weight = (self._known_of(args[name]) for name in ("input", "weight"))
        if x is None or weight is None:
            self._note(args, x, weight)
            return False
        bias = args.pop("bias", None)
        config = self._plan.get(x.op)
        scheme = None if config is None else config.bias
        value = self._constants.get(bias) if isinstance(bias, fx.Node) else None
        found = layer(kind, x, weight, value, scheme, args.get("groups", 1))
        if isinstance(found, str):
            self.document.left[x.op] = found
            return False
        by_float = found.floats_bias or (bias is not None and value is None)
        name = f"{node.name}__sums" if by_float else node.name
        self._operation(node, name, found, args, x)
        if by_float:
            self._float_bias(node, name, bias, found.after)
        return True

    def _float_bias(self, node: fx.Node, sums: str, bias: fx.Node, after: int) -> None:
        """Add a bias to the floats of sums: one that has no static steps of products."""
        shaped = f"{node.name}__bias"
        args = {"self": self._reference(bias), "shape": [-1, *[1] * after]}
        self._add(shaped, "aten.reshape", args=args)
        args = {"self": {"node": sums}, "other": {"node": shaped}}
        self._add(node.name, "aten.add", args=args)
        self._known.pop(node, None)

    def _is_product(self, node: fx.Node) -> bool:
        args = arguments(node)
        first, second = args.values()
        a, b = self._known_of(first), self._known_of(second)
        if a is None or b is None:
            self._note({"a": first, "b": second}, a, b)
            return False
        found = matmul(a, b, int(first.meta["val"].shape[-1]))
        if isinstance(found, str):
            self.document.left[a.op] = found
            return False
        self._operation(node, node.name, found, {"self": first, "other": second}, a)
        return True

    def _operation(
        self, node: fx.Node, name: str, found: Operation, args: dict[str, Any], x: Known
    ) -> None:
        op = x.op
        fields: dict[str, Any] = {"accumulator_bits": found.bits}
        if found.left_shift:
            fields["left_shift"] = found.left_shift
        if found.bias is not None:
            parts = {"bias": found.bias.codes}
            if found.bias.multiplier is not None and found.bias.shift is not None:
                parts |= {"bias_multiplier": found.bias.multiplier, "bias_shift": found.bias.shift}
            self.document.tensors |= {f"{name}.{part}": value for part, value in parts.items()}
            fields |= {part: f"{name}.{part}" for part in parts}
        self._add(name, f"integer.{found.op}", args=self._encoded(args), **fields)
        scale = None if found.scale is None else found.scale
        self._known[node] = Known(
            op, found.worst, node.meta["val"].ndim, None, scale, 0, None, found.bits
        )
        self.document.layers.append(
            {
                "op": op,
                "node": name,
                "accumulator_bits": found.bits,
                "largest_sum": found.worst,
                "has_bias": found.bias is not None,
            }
        )
        self.document.done.add(op)

    def _note(self, args: Mapping[str, Any], x: Known | None, weight: Known | None) -> None:
        """Remember why the op at hand stays float."""
        if x is not None:
            self.document.left.setdefault(x.op, "its other operand is float")
        for arg in args.values():
            if isinstance(arg, fx.Node) and arg in self._weights:
                kept = "kept as integers" if weight is not None else "kept as floats"
                for op in self._weights[arg].ops:
                    why = why_no_weight(self._weights[arg].scheme) or "its input is float"
                    self.document.left.setdefault(op, f"{why}: its weight is {kept}")

    def _known_of(self, node: Any) -> Known | None:
        if not isinstance(node, fx.Node):
            return None
        if node in self._constants:
            self._constant(node)
        return self._known.get(node)

    def _reference(self, node: fx.Node) -> dict[str, str]:
        if node in self._constants:
            self._constant(node)
        return {"node": node.name}

    def _constant(self, node: fx.Node) -> None:
        """Write a constant where it is first used: a weight as integers, if it is one."""
        if node in self._written:
            return
        self._written.add(node)
        weight = self._weights.get(node)
        if weight is None or why_no_weight(weight.scheme):
            self.document.tensors[node.name] = as_array(self._constants[node])
            self._add(node.name, "constant", tensor=node.name)
            return
        tensors, fields, integers = weight_integers(weight)
        rows = "" if weight.ref.rows is None else f".{weight.ref.rows[0]}"
        keys = {part: f"{weight.ref.path}{rows}.{part}" for part in tensors}
        self.document.tensors |= {keys[part]: value for part, value in tensors.items()}
        self._add(node.name, "integer.weight", **keys, **fields)
        self._known[node] = known_weight(weight.ops[0], integers)

    def _encoded(self, value: Any) -> Any:
        match value:
            case fx.Node():
                return self._reference(value)
            case dict():
                return {key: self._encoded(each) for key, each in value.items()}
            case list() | tuple():
                return [self._encoded(each) for each in value]
            case float() if not math.isfinite(value):
                return {"number": str(value)}
            case torch.dtype():
                name = str(value).removeprefix("torch.")
                return "float32" if name in ("bfloat16", "float16") else name
        return value

    def _add(self, name: str, op: str, **fields: Any) -> None:
        self.document.nodes.append({"name": name, "op": op, **fields})


def name_of(node: fx.Node) -> str:
    """Return the name of a node's function, without namespace and overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


def _is_python(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload)


def _unknown(node: fx.Node) -> str | None:
    name = name_of(node)
    if is_marker(node):
        return None
    table = {**NUMBERS, "getitem": None} if _is_python(node) else FUNCTIONS
    return None if name in table else str(node.target)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name, without those of torch's own and those at None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        names = ("self", "index", *(f"arg{i}" for i in range(2, len(node.args))))
        return dict(zip(names, node.args, strict=False))
    schema = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(schema, node.args, strict=False)), **node.kwargs}
    return {k: v for k, v in given.items() if v is not None and k not in _LEFT_OUT}


def _defaults(node: fx.Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    listed = node.target._schema.arguments
    return {a.name: a.default_value for a in listed if a.default_value is not None}


def _drop_unused(document: Document) -> None:
    """Leave out nodes and tensors that no output needs; inputs and layers' facts stay."""
    needed = set(document.outputs)
    kept = []
    for node in reversed(document.nodes):
        if node["name"] in needed or node["op"] == "input":
            kept.append(node)
            needed.update(_names(node.get("args", {})))
    document.nodes = kept[::-1]
    used = {v for n in kept for v in n.values() if isinstance(v, str)}
    document.tensors = {key: t for key, t in document.tensors.items() if key in used}


def _names(value: Any) -> list[str]:
    if isinstance(value, dict):
        if isinstance(value.get("node"), str):
            return [value["node"]]
        return [name for each in value.values() for name in _names(each)]
    return [name for each in value for name in _names(each)] if isinstance(value, list) else []
