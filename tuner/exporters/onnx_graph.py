"""Rewrites a traced graph so that torch.onnx.export writes QDQ: small constants, shared pairs."""

import copy
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, fx

from tuner.errors import ExportError
from tuner.exporters.markers import operand_of
from tuner.exporters.onnx_activations import (
    Spelling,
    arithmetic,
    is_pair,
    paired,
    spelling_of,
    why_not_spelled,
)
from tuner.exporters.onnx_weights import (
    FOUR_BITS,
    WeightCodes,
    codes_of,
    dequantized,
    looked_up,
    packed_rows,
    why_not_stored,
)
from tuner.exporters.report import LeftFloat
from tuner.exporters.tracing import Traced, TracedWeight, is_marker

_LINEAR = torch.ops.aten.linear.default
_EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True, eq=False)
class Pair:
    """A quantized tensor of the graph: the marker that it stands for, and its spelling.

    `name` is that of the constants of the pair.
    """

    name: str
    marker: str
    spelling: Spelling


@dataclass(frozen=True, eq=False)
class QdqGraph:
    """A graph of ATen ops and QDQ, ready to be written.

    `weights` maps the stem of a weight's constants to its ops; `left_float` are weights without
    codes.
    """

    module: fx.GraphModule
    pairs: tuple[Pair, ...]
    weights: Mapping[str, tuple[str, ...]]
    left_float: tuple[LeftFloat, ...]


def float_graph(traced: Traced) -> fx.GraphModule:
    """Return the graph without its quantizers: FP32, with the weights as they are simulated."""
    module = _copied(traced.module)
    for node in list(module.graph.nodes):
        if is_marker(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module


def qdq_graph(traced: Traced) -> QdqGraph:
    """Return the graph with its quantizers and quantized weights as ONNX says them.

    Raises ExportError for activations that ONNX cannot quantize as the plan says.
    """
    _refuse(traced)
    rewriting = _Rewriting(_copied(traced.module))
    rewriting.spell_activations(traced)
    left = [found for weight in traced.weights if (found := rewriting.spell_weight(weight))]
    rewriting.module.graph.eliminate_dead_code()
    rewriting.module.recompile()
    _drop_unused(rewriting.module)
    return QdqGraph(rewriting.module, rewriting.pairs(), rewriting.weights, tuple(left))


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module with a graph of its own over the same constants."""
    graph = fx.Graph()
    found = graph.graph_copy(module.graph, {}, return_output_node=True)
    assert isinstance(found, tuple)
    values, output = found
    graph.output(values).meta = copy.copy(output.meta)
    graph.set_codegen(copy.copy(module.graph._codegen))
    return fx.GraphModule(module, graph)


def _refuse(traced: Traced) -> None:
    for key, quantizer in traced.quantizers.items():
        why = why_not_spelled(quantizer.scheme)
        if why is not None:
            op, index = operand_of(key)
            raise ExportError(
                f"{op}, {'output' if index < 0 else f'input {index}'}: {why}. Tune with "
                "TuningConfig(target='onnx'), which leaves such options out"
            )


class _Rewriting:
    """Changes one graph; names of constants are unique in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._nodes = {node.name: node for node in module.graph.nodes}
        self._names: set[str] = set()
        self.weights: dict[str, tuple[str, ...]] = {}
        self._pairs: dict[fx.Node, Pair] = {}

    def pairs(self) -> tuple[Pair, ...]:
        """Return the pairs in the order of the graph."""
        nodes = self.module.graph.nodes
        return tuple(self._pairs[node] for node in nodes if node in self._pairs)

    def spell_activations(self, traced: Traced) -> None:
        """Put QDQ in the place of markers; equal ones of one tensor become one pair."""
        known: dict[Any, fx.Node] = {}
        for marker, key in list(traced.markers()):
            node, quantizer = self._nodes[marker.name], traced.quantizers[key]
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if is_pair(quantizer.scheme):
                spelling = spelling_of(quantizer)
                identity = source, spelling.scale.item(), spelling.codes, _identity(spelling)
                if identity not in known:
                    name = self._unused(key)
                    known[identity] = self._pair(node, source, spelling, name)
                    self._pairs[known[identity]] = Pair(name, marker.name, spelling)
                new = known[identity]
            else:
                # a graph can only call what has a name
                spelled = update_wrapper(partial(arithmetic, quantizer=quantizer), arithmetic)
                new = self._call(node, spelled, source)
            node.replace_all_uses_with(new)
            self.module.graph.erase_node(node)

    def _pair(self, node: fx.Node, source: fx.Node, spelling: Spelling, name: str) -> fx.Node:
        # pairs that are shared must come right after their tensor
        with self.module.graph.inserting_after(source):
            scale = self._constant(f"{name}_scale", spelling.scale)
        with self.module.graph.inserting_after(scale):
            zero_point = self._constant(f"{name}_zero_point", spelling.zero_point)
        with self.module.graph.inserting_after(zero_point):
            args = source, scale, zero_point, spelling.codes
            return self.module.graph.call_function(paired, args)

    def spell_weight(self, weight: TracedWeight) -> LeftFloat | None:
        """Put codes in the place of a weight's floats; return why, where that cannot be."""
        name = ", ".join(weight.ops)
        if not weight.nodes:
            return LeftFloat(name, "the traced graph has no constant that is this weight")
        if (why := why_not_stored(weight.scheme)) is not None:
            return LeftFloat(name, why)
        codes = codes_of(weight)
        nodes = [self._nodes[found] for found in weight.nodes]
        users = [user for node in nodes for user in list(node.users)]
        transposes = len(weight.shape) == 2 and all(_is_of(u, _LINEAR, 1, nodes) for u in users)
        stem = self._unused(weight.ref.path + ("" if weight.ref.rows is None else "_rows"))
        self.weights[stem] = weight.ops
        if users and all(_is_of(user, _EMBEDDING, 0, nodes) for user in users):
            return self._spell_embedding(codes, users, stem, name)
        if transposes:
            self._spell_linear(codes, users, stem)
            return None
        for node in nodes:
            self._replace(node, codes, stem)
        return None

    def _spell_linear(self, codes: WeightCodes, users: list[fx.Node], stem: str) -> None:
        """Write x Wᵀ + b as a product with codes `[in, out]`, which runtimes fuse."""
        turned = codes.transposed()
        values = self._values(users[0], turned, stem)
        for user in users:
            x, _, *bias = user.args
            product = self._call(user, torch.matmul, x, values)
            if bias and bias[0] is not None:
                bias[0] = self._bias(user, bias[0], turned, stem)
                product = self._call(user, torch.add, product, bias[0])
            user.replace_all_uses_with(product)
            self.module.graph.erase_node(user)

    def _bias(self, user: fx.Node, bias: Any, weight: WeightCodes, stem: str) -> fx.Node:
        """Return a bias in steps of input scale × weight scale, for matrices; else as it is.

        Runtimes take a product of matrices and its bias together, and then want integers of both.
        """
        pair = self._pairs.get(user.args[0])  # type: ignore[arg-type]
        in_channels = weight.axis == 1 and not weight.group and weight.scale.dim() == 1
        if pair is None or not in_channels or user.meta["val"].dim() != 2 or bias.op != "get_attr":
            return bias  # type: ignore[no-any-return]
        if weight.codes.dtype != torch.int8 or pair.spelling.zero_point.dtype != torch.uint8:
            return bias  # type: ignore[no-any-return]
        values = operator.attrgetter(str(bias.target))(self.module).detach().double()
        steps = (pair.spelling.scale.double() * weight.scale.double()).expand_as(values)
        codes = torch.round(values / steps)
        if bool((codes.abs() >= 2**31).any()):
            return bias  # type: ignore[no-any-return]
        name = self._unused(f"{stem}_bias")
        with self.module.graph.inserting_before(user):
            constants = [
                self._constant(f"{name}_codes", codes.to(torch.int32)),
                self._constant(f"{name}_scale", steps.float()),
                self._constant(f"{name}_zero_point", torch.zeros_like(codes, dtype=torch.int32)),
            ]
        return self._call(user, dequantized, *constants, 0, 0, len(codes))

    def _spell_embedding(
        self, codes: WeightCodes, users: list[fx.Node], stem: str, name: str
    ) -> LeftFloat | None:
        by_row = codes.axis == 0 and not codes.group
        if codes.group and codes.axis == 0:
            return LeftFloat(name, "rows of an embedding cannot be looked up in groups of rows")
        width = codes.length if codes.group else codes.codes.shape[1]
        packs = codes.bits == 4 and codes.codes.shape[1] % 2 == 0
        table = packed_rows(codes.codes) if packs else codes.codes
        scale, zero = codes.scale, codes.zero_point
        if by_row and scale.dim() == 1:
            scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
        for user in users:
            with self.module.graph.inserting_before(user):
                constants = [
                    self._constant(f"{stem}_{part}", tensor)
                    for part, tensor in (("codes", table), ("scale", scale), ("zero_point", zero))
                ]
            new = self._call(user, looked_up, user.args[1], *constants, codes.group, width)
            user.replace_all_uses_with(new)
            self.module.graph.erase_node(user)
        return None

    def _replace(self, node: fx.Node, codes: WeightCodes, stem: str) -> None:
        values = self._values(node, codes, stem)
        node.replace_all_uses_with(values)
        self.module.graph.erase_node(node)

    def _values(self, before: fx.Node, codes: WeightCodes, stem: str) -> fx.Node:
        """Return a node before another that yields the floats of codes."""
        ending = FOUR_BITS if codes.bits == 4 else ""
        with self.module.graph.inserting_before(before):
            constants = [
                self._constant(f"{stem}{ending or '_codes'}", codes.codes),
                self._constant(f"{stem}_scale", codes.scale),
                self._constant(f"{stem}_zero_point{ending}", codes.zero_point),
            ]
        return self._call(before, dequantized, *constants, codes.axis, codes.group, codes.length)

    def _call(self, before: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        with self.module.graph.inserting_before(before):
            return self.module.graph.call_function(function, args)

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        if name not in dict(self.module.named_buffers()):
            self.module.register_buffer(name, value)
        return self.module.graph.get_attr(name)

    def _unused(self, wish: str) -> str:
        clean = re.sub(r"\W+", "_", wish).strip("_") or "input"
        name, count = clean, 1
        while name in self._names:
            count += 1
            name = f"{clean}_{count}"
        self._names.add(name)
        return name


def _identity(spelling: Spelling) -> tuple[Any, ...]:
    zero = spelling.zero_point
    return zero.dtype, zero.float().item()


def _is_of(user: fx.Node, target: Any, position: int, nodes: list[fx.Node]) -> bool:
    """Whether a node calls the target with one of these nodes at a position, and nowhere else."""
    args = list(user.args)
    is_there = user.target is target and len(args) > position and args[position] in nodes
    return is_there and sum(arg in nodes for arg in args if isinstance(arg, fx.Node)) == 1


def _drop_unused(module: fx.GraphModule) -> None:
    """Drop parameters that no node reads any more."""
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
