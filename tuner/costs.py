"""What a plan costs: bytes and bit operations, per op and per model.

bops = Σ MACs · bits(left) · bits(right) over every MAC of the model, 32 bits where float
(van Baalen et al., Bayesian Bits, NeurIPS 2020, section 3, count them the same way).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from torch import Tensor, nn

from tuner import formats
from tuner.biases import bias_name, counts_products
from tuner.granularity import PerBlock, PerChannel, PerGroup, PerToken
from tuner.graph import OpGraph
from tuner.operands import operand_shape, static_operands
from tuner.ops import Op, WeightRef
from tuner.schemes import OpConfig, TensorScheme
from tuner.slices import slice_count

FLOAT_BITS = 32
_SCALE_BYTES = 4
_ZERO_POINT_BYTES = 4
_BLOCK_SCALE_BYTES = {"e8m0": 1, "e4m3": 1, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Costs:
    """Bytes and bit operations of a model under a plan, or of one op."""

    size_bytes: float
    bops: float

    def to_dict(self) -> dict[str, float]:
        """Return the costs by name."""
        return {"size_bytes": self.size_bytes, "bops": self.bops}


class CostModel:
    """Costs of every op of one model under any configuration.

    `shapes` and `itemsizes` speak of the parameters as they are once batch norm is folded;
    `float_bytes` is the size of all parameters and buffers in float.
    """

    def __init__(self, model: nn.Module, graph: OpGraph, left_out: Iterable[str] = ()) -> None:
        self._graph = graph
        out = set(left_out)
        tensors = {name: t for name, t in named_storage(model).items() if name not in out}
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self._itemsizes = {name: t.element_size() for name, t in tensors.items()}
        self.float_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        self.float_bops = float(graph.macs * FLOAT_BITS * FLOAT_BITS)

    def bops(self, op: Op, config: OpConfig) -> float:
        """Return the bit operations of an op, per sample."""
        return float(
            sum(
                product.macs * _bits(op, config, product.left) * _bits(op, config, product.right)
                for product in op.products
            )
        )

    def weight_shape(self, ref: WeightRef) -> tuple[int, ...]:
        """Return the shape of a weight."""
        shape = self._shapes[ref.path]
        return shape if ref.rows is None else (ref.rows[1] - ref.rows[0], *shape[1:])

    def weight_bytes(self, ref: WeightRef, scheme: TensorScheme | None) -> float:
        """Return the bytes of a weight: packed codes, scales and zero points, or floats."""
        shape = self.weight_shape(ref)
        if scheme is None:
            return float(prod(shape) * self._itemsizes[ref.path])
        return float(_stored_bytes(shape, scheme))

    def op_bytes(self, op: Op, config: OpConfig) -> float:
        """Return the bytes of an op's weights and of its static activation parameters.

        A quantized bias counts with the bytes that it takes more, or less, than in float.
        """
        weights = sum(self.weight_bytes(ref, config.weight) for ref in op.weights)
        return weights + self.bias_bytes(op, config) + self.activation_bytes(op, config)

    def bias_bytes(self, op: Op, config: OpConfig) -> float:
        """Return how many bytes more a quantized bias takes than a float one; mostly below 0."""
        name = bias_name(op.name)
        if config.bias is None or name not in self._shapes:
            return 0.0
        shape = self._shapes[name]
        scales = 0 if counts_products(config) else _scale_bytes(shape, config.bias)
        codes = _code_bytes(shape, config.bias)
        return float(codes + scales - prod(shape) * self._itemsizes[name])

    def activation_bytes(self, op: Op, config: OpConfig) -> float:
        """Return the bytes of an op's static activation parameters."""
        total = 0
        for index, scheme in static_operands(op, config):
            is_integer = formats.get(scheme.format).kind == "int"
            per_scale = _SCALE_BYTES + (_ZERO_POINT_BYTES if is_integer else 0)
            total += per_scale * slice_count(operand_shape(op, index), scheme.granularity)
        return float(total)

    def costs(self, plan: Mapping[str, OpConfig]) -> Costs:
        """Return the costs of the whole model under a plan; tied weights count once."""
        size = float(self.float_bytes)
        bops = float(sum(self._graph.uncovered.values()) * FLOAT_BITS * FLOAT_BITS)
        counted: set[tuple[str, tuple[int, int] | None]] = set()
        for op in self._graph.ops.values():
            config = plan.get(op.name, OpConfig.float())
            bops += self.bops(op, config)
            size += self.activation_bytes(op, config) + self.bias_bytes(op, config)
            for ref in op.weights:
                if ref.key not in counted:
                    counted.add(ref.key)
                    size += self.weight_bytes(ref, config.weight) - self.weight_bytes(ref, None)
        return Costs(size, bops)


def named_storage(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer once, by its first name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            tensors[name] = buffer
    return tensors


def _stored_bytes(shape: tuple[int, ...], scheme: TensorScheme) -> int:
    return _code_bytes(shape, scheme) + _scale_bytes(shape, scheme)


def _code_bytes(shape: tuple[int, ...], scheme: TensorScheme) -> int:
    return ceil(prod(shape) * scheme.bits / 8)


def _scale_bytes(shape: tuple[int, ...], scheme: TensorScheme) -> int:
    """Return the bytes of all scales and zero points: block formats have scales of their own."""
    fmt = formats.get(scheme.format)
    if not fmt.scaled:
        return 0
    per_scale = _SCALE_BYTES + (0 if scheme.symmetric else _ZERO_POINT_BYTES)
    if fmt.block is not None:
        per_scale = _BLOCK_SCALE_BYTES[fmt.block.scale]
    whole = _SCALE_BYTES if fmt.block is not None and fmt.block.scale == "e4m3" else 0
    return scale_count(shape, scheme) * per_scale + whole


def scale_count(shape: tuple[int, ...], scheme: TensorScheme) -> int:
    """Return how many scales a weight of this shape has."""
    granularity = scheme.reach
    if isinstance(granularity, PerToken):
        return prod(shape[:-1])
    if isinstance(granularity, PerChannel):
        return shape[granularity.axis]
    if isinstance(granularity, (PerGroup, PerBlock)):
        axis = granularity.axis if isinstance(granularity, PerGroup) else -1
        return prod(shape) // max(shape[axis], 1) * ceil(shape[axis] / granularity.size)
    return 1


def _bits(op: Op, config: OpConfig, index: int | None) -> int:
    if index is None:
        return FLOAT_BITS
    scheme = config.input_scheme(index) if index in op.activations else config.weight
    return FLOAT_BITS if scheme is None else scheme.bits
