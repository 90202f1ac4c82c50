"""Spells quantized tensors with the ops of PyTorch's `quantized_decomposed`, in a graph."""

from dataclasses import dataclass

import torch

# registers the ops: that is all that is taken from here
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from tuner.exporters.torch_values import Int8Weight, StaticCodes
from tuner.schemes import TensorScheme

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

_UINT8 = (0, 255, torch.uint8)
_INT8 = (-128, 127, torch.int8)
_SHIFT = 128
_MIDDLE = 8
_STEP = 16


SPELLED = "accutune_marker"
"""The key in a node's meta under which one that quantizes has its SpelledMarker."""


@dataclass(frozen=True)
class SpelledMarker:
    """The marker that a node stands for: its node in the traced graph, its key, its codes."""

    node: str
    key: str
    codes: StaticCodes


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph over flat inputs, with the same tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


class Speller:
    """Writes nodes into a graph, before one of its nodes."""

    def __init__(self, module: fx.GraphModule, before: fx.Node) -> None:
        self._module = module
        self._before = before

    def call(self, op: object, *args: object, **kwargs: object) -> fx.Node:
        """Add a call of an op."""
        with self._module.graph.inserting_before(self._before):
            return self._module.graph.call_function(op, args, kwargs)  # type: ignore[arg-type]

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """Add a constant. Each is a tensor of its own: equal ones would become one node."""
        unique, count = name, 0
        while hasattr(self._module, unique):
            count += 1
            unique = f"{name}_{count}"
        self._module.register_buffer(unique, value)
        with self._module.graph.inserting_before(self._before):
            return self._module.graph.get_attr(unique)

    def module(self, name: str, module: torch.nn.Module, *args: fx.Node) -> fx.Node:
        """Add a call of a module."""
        if not hasattr(self._module, name):
            self._module.add_module(name, module)
        with self._module.graph.inserting_before(self._before):
            return self._module.graph.call_module(name, args)

    def static(self, x: fx.Node, marker: SpelledMarker) -> fx.Node:
        """Quantize to uint8 codes of a known scale, and back.

        Fewer codes than 256 are a clamp before: fused into a kernel, the codes of an output are
        clamped to those of uint8 whatever the op says.
        """
        codes = marker.codes
        if not codes.is_full:
            x = self.call(aten.clamp.default, x, *codes.ends)
        scaled = codes.scale, codes.zero_point
        quantized = self.call(decomposed.quantize_per_tensor.default, x, *scaled, *_UINT8)
        quantized.meta[SPELLED] = marker
        return self.call(decomposed.dequantize_per_tensor.default, quantized, *scaled, *_UINT8)

    def weight(
        self, name: str, codes: fx.Node, weight: Int8Weight, in_float: bool = False
    ) -> fx.Node:
        """Dequantize int8 codes, in the shape of the weight.

        With `in_float` the values are doubled halves: the compiler makes no integer kernel of them.
        """
        shape = list(weight.codes.shape)
        if weight.groups > 1:
            codes = self.call(aten.view.default, codes, [-1, shape[1] // weight.groups])
        # a scale of its own for each use: one node with two users would have no kernel
        scale = self.constant(
            f"{name}_scale", weight.scale / 2 if in_float else weight.scale.clone()
        )
        zeros = torch.zeros(len(weight.scale), dtype=torch.int64)
        zero = self.constant(f"{name}_zero_point", zeros)
        values = self.call(decomposed.dequantize_per_channel.default, codes, scale, zero, 0, *_INT8)
        if in_float:
            values = self.call(aten.mul.Tensor, values, 2.0)
        if weight.groups > 1:
            return self.call(aten.view.default, values, shape)
        return self.call(aten.t.default, values) if weight.is_transposed else values

    def rows(self, name: str, codes: fx.Node, weight: Int8Weight, lookup: fx.Node) -> fx.Node:
        """Look rows of int8 codes up, and dequantize these alone."""
        scale = self.constant(f"{name}_rows", weight.scale.reshape(-1, weight.groups))
        rest = lookup.args[1:]
        found = self.call(aten.embedding.default, codes, *rest, **lookup.kwargs)
        scales = self.call(aten.embedding.default, scale, *rest, **lookup.kwargs)
        values = self.call(aten.to.dtype, found, torch.float32)
        if weight.groups == 1:
            return self.call(aten.mul.Tensor, values, scales)
        parted = self.call(aten.unflatten.int, values, -1, [weight.groups, -1])
        scaled = self.call(aten.mul.Tensor, parted, self.call(aten.unsqueeze.default, scales, -1))
        return self.call(aten.flatten.using_ints, scaled, -2)

    def unpacked(self, name: str, packed: fx.Node, weight: Int8Weight) -> fx.Node:
        """Dequantize codes of which two are in a byte, in the shape of the weight.

        The bytes are dequantized first, by one: of all ops on constants the compiler leaves this
        one alone, and would store what another one gives.
        """
        rows = len(weight.codes)
        half = -(-rows // 2)
        scales = weight.scale.reshape(rows, weight.groups, 1).split(half)
        values = self.call(decomposed.dequantize_per_tensor.default, packed, 1.0, 0, *_UINT8)
        parts = []
        for codes, scale, part in zip(self._halves(values), scales, ("low", "high"), strict=True):
            centred = self.call(aten.sub.Tensor, codes, _MIDDLE)
            if len(scale) < half:
                centred = self.call(aten.slice.Tensor, centred, 0, 0, len(scale))
            grouped = self.call(aten.view.default, centred, [len(scale), weight.groups, -1])
            constant = self.constant(f"{name}_{part}", scale.clone())
            parts.append(self.call(aten.mul.Tensor, grouped, constant))
        whole = self.call(aten.cat.default, parts)
        whole = self.call(aten.view.default, whole, list(weight.codes.shape))
        return self.call(aten.t.default, whole) if weight.is_transposed else whole

    def packed_rows(
        self, name: str, packed: fx.Node, weight: Int8Weight, lookup: fx.Node
    ) -> fx.Node:
        """Look rows up in bytes that have two codes each, and dequantize these alone."""
        half = -(-len(weight.codes) // 2)
        index = lookup.args[1]
        scale = self.constant(f"{name}_rows", weight.scale.reshape(-1, weight.groups, 1))
        row = self.call(aten.remainder.Scalar, index, half)
        found = self.call(aten.embedding.default, packed, row)
        low, high = self._halves(self.call(aten.to.dtype, found, torch.float32))
        is_high = self.call(aten.unsqueeze.default, self.call(aten.ge.Scalar, index, half), -1)
        codes = self.call(aten.sub.Tensor, self.call(aten.where.self, is_high, high, low), _MIDDLE)
        grouped = self.call(aten.unflatten.int, codes, -1, [weight.groups, -1])
        scales = self.call(aten.index.Tensor, scale, [index])
        return self.call(aten.flatten.using_ints, self.call(aten.mul.Tensor, grouped, scales), -2)

    def _halves(self, values: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the low and the high four bits of bytes, all of them as floats."""
        high = self.call(aten.floor.default, self.call(aten.mul.Tensor, values, 1 / _STEP))
        shifted = self.call(aten.mul.Tensor, high, float(_STEP))
        return self.call(aten.sub.Tensor, values, shifted), high

    def tokens(self, x: fx.Node, scheme: TensorScheme) -> tuple[fx.Node, fx.Node]:
        """Quantize by the range of each token; return codes times 1, and the scales `[…, 1]`.

        The codes pass as uint8 with scale 1 and zero point 128: what the kernel of a known scale
        computes is then the sum of codes, exactly.
        """
        low, high = scheme.quant_range
        magnitude = self.call(aten.abs.default, x)
        largest = self.call(aten.amax.default, magnitude, [-1], True)
        divided = self.call(aten.div.Tensor, largest, min(high, -low) or max(high, -low))
        # the smallest normal number: one that is not 0 divides, and 0 stays a code of 0
        scale = self.call(aten.clamp.default, divided, torch.finfo(torch.float32).tiny)
        steps = self.call(aten.round.default, self.call(aten.div.Tensor, x, scale))
        clamped = self.call(aten.clamp.default, steps, low, high)
        shifted = self.call(aten.add.Tensor, clamped, _SHIFT)
        codes = self.call(aten.to.dtype, shifted, torch.uint8)
        # the compiler fails at products of permuted tensors whose lengths are free
        codes = self.call(aten.contiguous.default, codes)
        ones = 1.0, _SHIFT
        return self.call(decomposed.dequantize_per_tensor.default, codes, *ones, *_UINT8), scale
