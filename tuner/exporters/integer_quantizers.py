"""Nodes that quantize: of floats, and of integers by multiplier and shift."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tuner.exporters.integer_known import ACCUMULATOR, Known
from tuner.exporters.integer_shapes import MOVES
from tuner.exporters.integer_values import Array, fixed_point
from tuner.granularity import PerChannel, PerToken
from tuner.quantizer import Quantizer
from tuner.ranges import symmetric_zero_point

_CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "minimum", "maximum")
Ends = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class Fields:
    """What a node has beside name, op and args, and its tensors."""

    node: dict[str, Any]
    tensors: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Chain:
    """What is between integers and a quantizer: clamps, in order, and moves.

    Both commute with a quantizer of one scale: it is monotone, and works on each value alone.
    """

    root: fx.Node
    clamps: tuple[Ends, ...]
    moves: tuple[fx.Node, ...]


def chain_to(
    source: fx.Node, known: Mapping[fx.Node, Known], constants: Mapping[fx.Node, Tensor]
) -> Chain | None:
    """Return the way from integers that can be requantized to here, None if there is none."""
    clamps: list[Ends] = []
    moves: list[fx.Node] = []
    node = source
    while node not in known:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        ends = _clamp(node, constants)
        if ends is not None:
            clamps.insert(0, ends)
        elif _moves(node):
            if any(isinstance(end, np.ndarray) for each in clamps for end in each):
                return None  # what broadcasts behind a move does not before it
            moves.insert(0, node)
        else:
            return None
        node = node.args[0]
    found = known[node]
    is_sum = 0 < found.bits <= ACCUMULATOR and found.scale is not None
    is_code = not found.bits and found.integers is None and found.is_one_scale
    return Chain(node, tuple(clamps), tuple(moves)) if is_sum or is_code else None


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


def _moves(node: fx.Node) -> bool:
    name = _name(node)
    return name == "getitem" or (name in MOVES and name not in ("index", "gather", "expand_as"))


def _clamp(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> Ends | None:
    name = _name(node)
    if name not in _CLAMPS:
        return None
    given = [*node.args[1:], *node.kwargs.values()]
    values = [constants.get(v) if isinstance(v, fx.Node) else v for v in given]
    if name == "relu":
        return 0.0, None
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        return (*values, *(-1.0, 1.0)[len(values) :])  # type: ignore[return-value]
    if any(isinstance(v, fx.Node) for v in given) and any(v is None for v in values):
        return None
    ends = [v.double().numpy() if isinstance(v, Tensor) else v for v in values]
    if name in ("minimum", "clamp_max"):
        return None, ends[0]
    return (ends[0], ends[1] if len(ends) > 1 else None)


def quantize_node(name: str, quantizer: Quantizer, axes: int) -> Fields:
    """Return the fields of a node that quantizes floats with so many axes."""
    scheme, qparams = quantizer.scheme, quantizer.qparams
    low, high = scheme.quant_range
    fields: dict[str, Any] = {"format": scheme.format, "low": low, "high": high}
    fields["symmetric"] = scheme.symmetric
    if qparams is None:
        fields["dynamic"] = "token" if isinstance(scheme.granularity, PerToken) else "tensor"
        fields["zero_point"] = symmetric_zero_point(scheme) if scheme.symmetric else 0
        fields["power_of_two"] = scheme.power_of_two_scale
        return Fields(fields, {})
    zero_points = 0 if qparams.zero_point is None else qparams.zero_point
    tensors: dict[str, Array] = {}
    for part, value in (("scale", qparams.scale), ("zero_point", zero_points)):
        array = torch.as_tensor(value).numpy()
        if not isinstance(scheme.granularity, PerChannel):
            fields[part] = array.item()
            continue
        axis = scheme.granularity.axis % axes
        shape = [-1 if i == axis else 1 for i in range(axes)] if array.ndim else ()
        tensors[f"{name}.{part}"] = array.reshape(shape)
        fields[part] = f"{name}.{part}"
    return Fields(fields | _range(fields), tensors)


def _range(fields: Mapping[str, Any]) -> dict[str, Any]:
    scale, zero_point = fields["scale"], fields["zero_point"]
    if isinstance(scale, str):
        return {}
    return {"range": [(fields[end] - zero_point) * scale for end in ("low", "high")]}


def requantize_node(name: str, quantizer: Quantizer, source: Known, chain: Chain) -> Fields:
    """Return the fields of a node that requantizes integers, the clamps in its ends."""
    plain = quantize_node(name, quantizer, 0)
    scale, zero_point = plain.node["scale"], plain.node["zero_point"]
    assert source.scale is not None
    multiplier, shift = fixed_point(source.scale / scale)
    tensors = {f"{name}.multiplier": multiplier, f"{name}.shift": shift}
    low, high = np.asarray(plain.node["low"]), np.asarray(plain.node["high"])
    least, most = low, high

    def code(value: Any) -> Array:
        steps = np.rint(np.asarray(value, dtype=np.float64) / scale) + zero_point
        return np.asarray(np.clip(steps, least, most).astype(np.int64))

    for bottom, top in chain.clamps:
        if bottom is not None:
            low, high = np.maximum(low, code(bottom)), np.maximum(high, code(bottom))
        if top is not None:
            low, high = np.minimum(low, code(top)), np.minimum(high, code(top))
    ends: dict[str, Any] = {}
    for end, value in (("low", low), ("high", high)):
        ends[end] = int(value) if not value.ndim else f"{name}.{end}"
        if value.ndim:
            tensors[f"{name}.{end}"] = value.astype(np.int32)
    keys = {"multiplier": f"{name}.multiplier", "shift": f"{name}.shift"}
    return Fields(plain.node | ends | keys, tensors)
