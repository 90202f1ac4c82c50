"""The presets: which configurations each op may have."""

from collections.abc import Callable
from dataclasses import dataclass

from tuner.errors import UnsupportedError
from tuner.granularity import PerChannel, PerGroup, PerToken
from tuner.ops import Op
from tuner.schemes import CalibrationMethod, OpConfig, TensorScheme

GROUP_SIZES = (128, 32)
INPUT_CALIBRATIONS = ("mse", "minmax", "percentile")
_MIXED = ((8, 8), (6, 8), (4, 8), (3, 8), (2, 8), (6, 6), (4, 6), (4, 4), (3, 4), (2, 4))


@dataclass(frozen=True)
class Candidate:
    """A configuration that an op may have, under the label that uniform plans go by.

    `given` says that the user wrote it: then its calibration methods are not exchanged.
    """

    label: str
    config: OpConfig
    given: bool = False


def preset_candidates(preset: str, op: Op, shapes: dict[str, tuple[int, ...]]) -> list[Candidate]:
    """Return an op's quantizing configurations under a preset, FP32 left out.

    `shapes` are those of the model's parameters. Raises UnsupportedError for presets whose
    formats this version does not have.
    """
    if preset not in _PRESETS:
        raise UnsupportedError(
            f"the preset {preset!r} needs float formats, which this version does not have yet: "
            f"choose one of {', '.join(_PRESETS)}"
        )
    if not op.by_default or not (op.weights or op.products):
        return []
    unique: dict[OpConfig, Candidate] = {}
    for candidate in _PRESETS[preset](op, shapes):
        unique.setdefault(candidate.config, candidate)
    return list(unique.values())


def _int8(op: Op, shapes: dict[str, tuple[int, ...]]) -> list[Candidate]:
    return [_static(op, 8, 8)]


def _mixed_int(op: Op, shapes: dict[str, tuple[int, ...]]) -> list[Candidate]:
    return [_static(op, weight, inputs) for weight, inputs in _MIXED]


def _static(op: Op, weight_bits: int, input_bits: int) -> Candidate:
    """Per-channel symmetric weight; per-tensor affine static inputs, MSE-calibrated."""
    weight = _per_channel(op, weight_bits) if op.weights else None
    scheme = TensorScheme(format=f"uint{input_bits}", symmetric=False, calibration="mse")
    inputs = _for_operands(op, scheme)
    return Candidate(_label(weight_bits, input_bits, op), OpConfig(weight=weight, inputs=inputs))


def _int8_dynamic(op: Op, shapes: dict[str, tuple[int, ...]]) -> list[Candidate]:
    weight = _per_channel(op, 8) if op.weights else None
    per_token = TensorScheme(format="int8", granularity=PerToken(), dynamic=True)
    per_tensor = TensorScheme(format="uint8", symmetric=False, dynamic=True)
    rows = () if op.type.startswith("Conv") else _CONTRACT_LAST.get(op.type, (0,))
    inputs = tuple(
        (per_token if i in rows else per_tensor) if i in op.activations else None
        for i in range(op.operand_count)
    )
    return [Candidate(_label(8, 8, op), OpConfig(weight=weight, inputs=inputs or None))]


# operands whose last axis is the one summed over: there a scale per token can be applied after it
_CONTRACT_LAST = {"scaled_dot_product_attention": (0, 1, 2)}


def _int4_weight_only(op: Op, shapes: dict[str, tuple[int, ...]]) -> list[Candidate]:
    if not op.weights:
        return []
    return [Candidate(f"W{bits}", OpConfig(weight=_per_group(op, bits, shapes))) for bits in (4, 8)]


def _per_group(op: Op, bits: int, shapes: dict[str, tuple[int, ...]]) -> TensorScheme:
    """Groups along the input channels: 128, or 32 where that does not divide."""
    ref = op.weights[0]
    shape = shapes[ref.path]
    axis = 1 - ref.axis if op.type.startswith("Conv") else (-1 if ref.axis == 0 else 0)
    length = shape[axis]
    size = next((s for s in GROUP_SIZES if length % s == 0), GROUP_SIZES[-1])
    return TensorScheme(
        format=f"int{bits}", granularity=PerGroup(size, axis), calibration=_weight_method(bits)
    )


def _per_channel(op: Op, bits: int) -> TensorScheme:
    axis = op.weights[0].axis
    return TensorScheme(
        format=f"int{bits}", granularity=PerChannel(axis), calibration=_weight_method(bits)
    )


def _weight_method(bits: int) -> CalibrationMethod:
    """Return how weights are ranged: clipping pays at few levels only."""
    return "mse" if bits < 8 else "minmax"


def _for_operands(op: Op, scheme: TensorScheme) -> tuple[TensorScheme | None, ...] | None:
    indices = range(op.operand_count)
    return tuple(scheme if i in op.activations else None for i in indices) or None


def _label(weight_bits: int, input_bits: int, op: Op) -> str:
    weight = f"W{weight_bits}" if op.weights else ""
    inputs = f"A{input_bits}" if op.activations else ""
    return weight + inputs


_PRESETS: dict[str, Callable[[Op, dict[str, tuple[int, ...]]], list[Candidate]]] = {
    "int8": _int8,
    "int8-dynamic": _int8_dynamic,
    "int4-weight-only": _int4_weight_only,
    "mixed-int": _mixed_int,
}
