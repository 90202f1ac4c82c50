"""The presets: which configurations each op may have.

`mx` has block formats where blocks on the last axis lie along the axis that the op sums over, as
hardware has them: linear and recurrent layers, embeddings, and products with a parameter that is
stored that way. Convolutions sum over channels, a product of two activations over another axis of
its second operand: they get e4m3fn, or int8, instead. Of a weight that several ops use, the first
use counts: there is one set of scales.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tuner.granularity import PerChannel, PerGroup, PerTensor, PerToken
from tuner.ops import Op
from tuner.records import describe_config
from tuner.schemes import CalibrationMethod, OpConfig, TensorScheme

Shapes = Mapping[str, tuple[int, ...]]

GROUP_SIZES = (128, 32)
INPUT_CALIBRATIONS = {
    "int": ("mse", "minmax", "percentile"),
    "float": ("mse", "minmax", "percentile"),
    "codebook": ("mse", "minmax", "percentile"),
    "function": ("minmax", "percentile"),
}
"""Kind of format → the methods worth a try for a static input."""

_FP8 = (("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"))
# e2m3 of the two FP6 elements: within a block of 32 the bits are better spent on the mantissa.
# (on normal values its mean square error is 3.6 times less than that of e3m2)
_MX = (
    ("mxfp8_e4m3", "mxfp8_e4m3"),
    ("mxfp6_e2m3", "mxfp6_e2m3"),
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
)
_MIXED = ((8, 8), (6, 8), (4, 8), (3, 8), (2, 8), (6, 6), (4, 6), (4, 4), (3, 4), (2, 4))


@dataclass(frozen=True)
class Candidate:
    """A configuration that an op may have, under the label that uniform plans go by.

    `given` says that the user wrote it: then its calibration methods are not exchanged.
    """

    label: str
    config: OpConfig
    given: bool = False


def along_first_axes(ops: Mapping[str, Op]) -> dict[str, Op]:
    """Return the ops with each weight's axis that of its first use: it has one set of scales."""
    first: dict[object, int] = {}
    found = {}
    for name, op in ops.items():
        axes = (first.setdefault(ref.key, ref.axis) for ref in op.weights)
        weights = tuple(replace(ref, axis=axis) for ref, axis in zip(op.weights, axes, strict=True))
        found[name] = replace(op, weights=weights)
    return found


def channel_axis(op: Op, shapes: Shapes) -> int | None:
    """Return the axis of the output channels of an op's weight, None where there are none.

    A vector has none: a scale for each of its values would leave nothing to round.
    """
    if not op.weights or len(shapes[op.weights[0].path]) < 2:
        return None
    return op.weights[0].axis


def preset_candidates(preset: str, op: Op, shapes: Shapes) -> list[Candidate]:
    """Return an op's quantizing configurations under a preset, FP32 left out.

    `shapes` are those of the model's parameters. Pass ops that share a weight along_first_axes().
    """
    if not op.by_default or not (op.weights or op.products):
        return []
    unique: dict[OpConfig, Candidate] = {}
    for candidate in _PRESETS[preset](op, shapes):
        unique.setdefault(candidate.config, candidate)
    return list(unique.values())


def _int8(op: Op, shapes: Shapes) -> list[Candidate]:
    return [_static(op, shapes, 8, 8)]


def _mixed_int(op: Op, shapes: Shapes) -> list[Candidate]:
    return [_static(op, shapes, weight, inputs) for weight, inputs in _MIXED]


def _static(op: Op, shapes: Shapes, weight_bits: int, input_bits: int) -> Candidate:
    """Per-channel symmetric weight; per-tensor affine static inputs, MSE-calibrated."""
    weight = _integers(op, shapes, weight_bits) if op.weights else None
    scheme = TensorScheme(format=f"uint{input_bits}", symmetric=False, calibration="mse")
    return _candidate(op, weight, scheme)


def _int8_dynamic(op: Op, shapes: Shapes) -> list[Candidate]:
    weight = _integers(op, shapes, 8) if op.weights else None
    per_token = TensorScheme(format="int8", granularity=PerToken(), dynamic=True)
    per_tensor = TensorScheme(format="uint8", symmetric=False, dynamic=True)
    rows = () if op.type.startswith("Conv") else _CONTRACT_LAST.get(op.type, (0,))
    inputs = tuple(
        (per_token if i in rows else per_tensor) if i in op.activations else None
        for i in range(op.operand_count)
    )
    label = _candidate(op, weight, per_tensor).label
    return [Candidate(label, OpConfig(weight=weight, inputs=inputs or None))]


# operands whose last axis is the one summed over: there a scale per token can be applied after it
_CONTRACT_LAST = {"scaled_dot_product_attention": (0, 1, 2)}


def _int4_weight_only(op: Op, shapes: Shapes) -> list[Candidate]:
    if not op.weights:
        return []
    return [Candidate(f"W{bits}", OpConfig(weight=_per_group(op, bits, shapes))) for bits in (4, 8)]


def _per_group(op: Op, bits: int, shapes: Shapes) -> TensorScheme:
    """Groups along the input channels: 128, or 32 where that does not divide."""
    ref = op.weights[0]
    shape = shapes[ref.path]
    axis = 1 - ref.axis if op.type.startswith("Conv") else (-1 if ref.axis == 0 else 0)
    length = shape[axis]
    size = next((s for s in GROUP_SIZES if length % s == 0), GROUP_SIZES[-1])
    return TensorScheme(
        format=f"int{bits}", granularity=PerGroup(size, axis), calibration=_weight_method(bits)
    )


def _integers(op: Op, shapes: Shapes, bits: int) -> TensorScheme:
    granularity = _per_channel(op, shapes)
    method = _weight_method(bits)
    return TensorScheme(format=f"int{bits}", granularity=granularity, calibration=method)


def _per_channel(op: Op, shapes: Shapes) -> PerChannel | PerTensor:
    axis = channel_axis(op, shapes)
    return PerTensor() if axis is None else PerChannel(axis)


def _weight_method(bits: int) -> CalibrationMethod:
    """Return how weights are ranged: clipping pays at few levels only."""
    return "mse" if bits < 8 else "minmax"


def _for_operands(op: Op, scheme: TensorScheme) -> tuple[TensorScheme | None, ...] | None:
    indices = range(op.operand_count)
    return tuple(scheme if i in op.activations else None for i in indices) or None


def _fp8(op: Op, shapes: Shapes) -> list[Candidate]:
    return [*(_float8(op, shapes, *formats) for formats in _FP8), _static(op, shapes, 8, 8)]


def _float8(op: Op, shapes: Shapes, weight_format: str, input_format: str) -> Candidate:
    """Per-channel weight; per-tensor static inputs."""
    weight = None
    if op.weights:
        weight = TensorScheme(format=weight_format, granularity=_per_channel(op, shapes))
    return _candidate(op, weight, TensorScheme(format=input_format))


def _mx(op: Op, shapes: Shapes) -> list[Candidate]:
    if not _sums_last_axes(op):
        return [_float8(op, shapes, *_FP8[0]), _static(op, shapes, 8, 8)]
    found = []
    for weight_format, input_format in _MX:
        weight = TensorScheme(format=weight_format) if op.weights else None
        found.append(_candidate(op, weight, TensorScheme(format=input_format)))
    return found


def _sums_last_axes(op: Op) -> bool:
    """Return whether the op sums over the last axis of its weight and of every activation."""
    if op.type.startswith("Conv") or op.type in ("einsum", "scaled_dot_product_attention"):
        return False
    last = (0, 1) if op.type == "Linear" else (0,)
    return set(op.activations) <= set(last) and all(ref.axis == 0 for ref in op.weights)


def _everything(op: Op, shapes: Shapes) -> list[Candidate]:
    dynamic = [_renamed(c, "dynamic") for c in _int8_dynamic(op, shapes)]
    grouped = [_renamed(c, "grouped") for c in _int4_weight_only(op, shapes)]
    return [*_mixed_int(op, shapes), *_fp8(op, shapes), *_mx(op, shapes), *dynamic, *grouped]


def _renamed(candidate: Candidate, word: str) -> Candidate:
    """Tell a candidate from one with the same formats."""
    return Candidate(f"{candidate.label} {word}", candidate.config)


def _candidate(op: Op, weight: TensorScheme | None, inputs: TensorScheme) -> Candidate:
    """Return the same scheme for all activations of an op, under the label of the formats."""
    label = describe_config(OpConfig(weight=weight, inputs=inputs if op.activations else None))
    return Candidate(label, OpConfig(weight=weight, inputs=_for_operands(op, inputs)))


_PRESETS: dict[str, Callable[[Op, Shapes], list[Candidate]]] = {
    "int8": _int8,
    "int8-dynamic": _int8_dynamic,
    "int4-weight-only": _int4_weight_only,
    "mixed-int": _mixed_int,
    "fp8": _fp8,
    "mx": _mx,
    "everything": _everything,
}
