"""Rewrites a traced graph so that torch.onnx.export writes QDQ: small constants, shared pairs."""

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
from tuner.exporters.onnx_attention import give_heads
from tuner.exporters.onnx_limits import unlimited
from tuner.exporters.onnx_masks import fill_empty_rows
from tuner.exporters.onnx_speed import speed_up
from tuner.exporters.onnx_weights import (
    FOUR_BITS,
    FOUR_BITS_READ_AS_EIGHT,
    HALVES,
    WeightCodes,
    codes_of,
    dequantized,
    guarded,
    looked_up,
    packed_rows,
    why_not_looked_up,
    why_not_stored,
)
from tuner.exporters.report import LeftFloat
from tuner.exporters.tracing import Traced, TracedWeight, copied_graph, is_marker

_LINEAR = torch.ops.aten.linear.default
_ADDMM = torch.ops.aten.addmm.default
_EMBEDDING = torch.ops.aten.embedding.default
_TURNING = (
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.numpy_T.default,
)


@dataclass(frozen=True, eq=False)
class Pair:
    """A quantized tensor of the graph: the marker that it stands for, and its spelling.

    `name` is that of the constants of the pair, `op` the first op that reads it.
    """

    name: str
    marker: str
    op: str
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

    def ops_of(self, scale: str) -> tuple[str, ...]:
        """Return the ops whose tensor a constant, named as a scale, belongs to."""
        stem = scale.removesuffix("_scale")
        owners = {pair.name: (pair.op,) for pair in self.pairs} | dict(self.weights)
        return owners.get(stem, ())


def float_graph(traced: Traced) -> fx.GraphModule:
    """Return the graph without its quantizers: FP32, with the weights as they are simulated."""
    module = copied_graph(traced.module)
    for node in list(module.graph.nodes):
        if is_marker(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    give_heads(module)
    fill_empty_rows(module)
    module.recompile()
    return module


def qdq_graph(traced: Traced, clips_values: bool = False, quick: bool = False) -> QdqGraph:
    """Return the graph with its quantizers and quantized weights as ONNX says them.

    Of activations of fewer than 8 bits the codes are clipped, or else the values before them: which
    of the two a runtime's integer kernels can take in differs. A `quick` graph is spelled as ONNX
    Runtime is fastest with.

    Raises ExportError for activations that ONNX cannot quantize as the plan says.
    """
    _refuse(traced)
    module = copied_graph(traced.module)
    give_heads(module)
    rewriting = _Rewriting(module, clips_values)
    rewriting.spell_activations(traced)
    left = [found for weight in traced.weights if (found := rewriting.spell_weight(weight))]
    rewriting.spell_sums_of_products()
    if quick:
        speed_up(rewriting.module)
    fill_empty_rows(rewriting.module)
    rewriting.module.graph.eliminate_dead_code()
    rewriting.module.recompile()
    _drop_unused(rewriting.module)
    return QdqGraph(rewriting.module, rewriting.pairs(), rewriting.weights, tuple(left))


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

    def __init__(self, module: fx.GraphModule, clips_values: bool) -> None:
        self.module = module
        self._clips_values = clips_values
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
                source = source if self._clips_values else unlimited(source, spelling)
                identity = source, spelling.scale.item(), spelling.codes, _identity(spelling)
                if identity not in known:
                    name = self._unused(key)
                    known[identity] = self._pair(source, spelling, name)
                    self._pairs[known[identity]] = Pair(
                        name, marker.name, operand_of(key)[0], spelling
                    )
                new = known[identity]
            else:
                # a graph can only call what has a name
                spelled = update_wrapper(partial(arithmetic, quantizer=quantizer), arithmetic)
                new = self._call(node, spelled, source)
            node.replace_all_uses_with(new)
            self.module.graph.erase_node(node)

    def _pair(self, source: fx.Node, spelling: Spelling, name: str) -> fx.Node:
        # pairs that are shared must come right after their tensor
        with self.module.graph.inserting_after(source):
            scale = self._constant(f"{name}_scale", spelling.scale)
        with self.module.graph.inserting_after(scale):
            zero_point = self._constant(f"{name}_zero_point", spelling.zero_point)
        with self.module.graph.inserting_after(zero_point):
            codes, values = spelling.codes, spelling.values
            limits = (None, values) if self._clips_values else (codes, None)
            args = source, scale, zero_point, *limits, name
            return self.module.graph.call_function(paired, args)

    def spell_weight(self, weight: TracedWeight) -> LeftFloat | None:
        """Put codes in the place of a weight's floats; return why, where that cannot be."""
        name = ", ".join(weight.ops)
        if not weight.nodes:
            return LeftFloat(name, "the traced graph has no constant that is this weight")
        if (why := why_not_stored(weight.scheme)) is not None:
            return LeftFloat(name, why)
        nodes = [self._nodes[found] for found in weight.nodes]
        stem = self._unused(weight.ref.path + ("" if weight.ref.rows is None else "_rows"))
        if weight.scheme.format in HALVES:
            self._spell_half(nodes, stem + HALVES[weight.scheme.format])
            return None
        codes = codes_of(weight)
        users = dict.fromkeys(user for node in nodes for user in node.users)
        products = [user for user in users if _is_of(user, _LINEAR, 1, nodes)]
        lookups = [user for user in users if _is_of(user, _EMBEDDING, 0, nodes)]
        self.weights[stem] = weight.ops
        if lookups and (why := why_not_looked_up(codes)) is not None:
            return LeftFloat(name, why)
        if len(products) + len(lookups) < len(users) or len(weight.shape) != 2:
            for node in nodes:
                self._replace(node, codes, stem)
        elif not products:
            self._spell_lookups(codes, lookups, stem)
        else:
            values = self._spell_linear(codes.transposed(), products, stem)
            self._spell_tied(codes, lookups, values)
        return None

    def _spell_half(self, nodes: list[fx.Node], name: str) -> None:
        for node in nodes:
            value = operator.attrgetter(str(node.target))(self.module)
            with self.module.graph.inserting_before(node):
                node.replace_all_uses_with(self._constant(name, value.detach()))
            self.module.graph.erase_node(node)

    def _spell_linear(self, turned: WeightCodes, users: list[fx.Node], stem: str) -> fx.Node:
        """Write x Wᵀ + b as a product with codes `[in, out]`; return the node of its floats."""
        first = next(node for node in self.module.graph.nodes if node in users)
        values = self._values(first, turned, stem, users)
        for user in users:
            x, _, *bias = user.args
            self._spell_product(user, x, values, bias[0] if bias else None)
        return values

    def spell_sums_of_products(self) -> None:
        """Write addmm of what is quantized, b + x W, as Linear is written."""
        for node in self.module.graph.find_nodes(op="call_function", target=_ADDMM):
            bias, x, values = node.args
            if x in self._pairs and not node.kwargs:  # of factors alpha and beta
                self._spell_product(node, x, values, bias)

    def _spell_product(self, node: fx.Node, x: Any, values: Any, bias: Any) -> None:
        """Put a product in a node's place; one with a bias gets an axis more.

        Else ONNX Runtime makes one op of both, which wants a bias of integers too, or knows no
        codes at all.
        """
        if bias is None:
            product = self._call(node, torch.matmul, x, values)
        else:
            product = self._call(node, torch.unsqueeze, x, 0)
            product = self._call(node, torch.matmul, product, values)
            product = self._call(node, torch.squeeze, product, 0)
            product = self._call(node, torch.add, product, bias)
        node.replace_all_uses_with(product)
        self.module.graph.erase_node(node)

    def _spell_tied(self, codes: WeightCodes, users: list[fx.Node], values: fx.Node) -> None:
        """Look rows up in the codes that a product has, transposed: a load folds that."""
        for user in users:
            # the product's constants may come later in the graph than this
            made = values.args[0] if values.target is guarded else values
            assert isinstance(made, fx.Node)
            parts = [str(node.target) for node in made.args[:3] if isinstance(node, fx.Node)]
            with self.module.graph.inserting_before(user):
                table, scale, zero = (self.module.graph.get_attr(part) for part in parts)
            turned = [self._call(user, torch.t, table)]
            for part in (scale, zero):
                if codes.scale.dim() == 2:
                    part = self._call(user, torch.t, part)
                elif codes.axis == 0 and codes.scale.dim() == 1:
                    part = self._call(user, torch.unsqueeze, part, 1)
                turned.append(part)
            self._look_up(user, turned, codes, packed=False)

    def _spell_lookups(self, codes: WeightCodes, users: list[fx.Node], stem: str) -> None:
        packs = codes.bits == 4 and codes.codes.shape[1] % 2 == 0
        table = packed_rows(codes.codes) if packs else codes.codes
        scale, zero = codes.scale, codes.zero_point
        if codes.axis == 0 and scale.dim() == 1:
            scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
        for user in users:
            with self.module.graph.inserting_before(user):
                constants = [
                    self._constant(f"{stem}_{part}", tensor)
                    for part, tensor in (("codes", table), ("scale", scale), ("zero_point", zero))
                ]
            self._look_up(user, constants, codes, packs)

    def _look_up(
        self, user: fx.Node, constants: list[fx.Node], codes: WeightCodes, packed: bool
    ) -> None:
        width = codes.length if codes.group else codes.codes.shape[1]
        new = self._call(user, looked_up, user.args[1], *constants, codes.group, width, packed)
        user.replace_all_uses_with(new)
        self.module.graph.erase_node(user)

    def _replace(self, node: fx.Node, codes: WeightCodes, stem: str) -> None:
        values = self._values(node, codes, stem, list(node.users))
        node.replace_all_uses_with(values)
        self.module.graph.erase_node(node)

    def _values(
        self, before: fx.Node, codes: WeightCodes, stem: str, users: list[fx.Node]
    ) -> fx.Node:
        """Return a node before another that yields the floats of codes, for their users."""
        parts = ("codes", codes.codes), ("scale", codes.scale), ("zero_point", codes.zero_point)
        with self.module.graph.inserting_before(before):
            constants = [self._constant(f"{stem}_{part}", value) for part, value in parts]
        extent = codes.axis, codes.group, codes.length
        stored = self._stored(users) if codes.bits == 4 else ""
        values = self._call(before, dequantized, *constants, *extent, stored)
        if codes.codes.dim() == 2 and self._is_misread(codes, users):
            values = self._call(before, guarded, values)
        return values

    def _is_misread(self, codes: WeightCodes, users: list[fx.Node]) -> bool:
        """Whether ONNX Runtime would multiply integers with scales that it takes for others.

        Before a product with a quantized input it takes every scale for one of a column.
        """
        has_columns = not codes.group and codes.scale.dim() < 2 and codes.codes.dtype == torch.int8
        for user in users:
            is_turned = user.target in _TURNING
            products = list(user.users) if is_turned else [user]
            if not any(arg in self._pairs for product in products for arg in product.args):
                continue
            if not has_columns or (codes.scale.dim() and codes.axis != (0 if is_turned else 1)):
                return True
        return False

    def _stored(self, users: list[fx.Node]) -> str:
        """Say how codes of 4 bits are stored: beside quantized inputs runtimes read int8 only."""
        pairs = [self._pairs.get(user.args[0]) for user in users]  # type: ignore[arg-type]
        is_integer = all(
            p is not None and p.spelling.zero_point.dtype == torch.uint8 for p in pairs
        )
        return FOUR_BITS_READ_AS_EIGHT if is_integer else FOUR_BITS

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
