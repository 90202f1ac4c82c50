"""What PyTorch's integer kernels on CPU can compute, op by op."""

from tuner.exporters.torch_values import why_no_int8, why_not_per_token, why_not_static
from tuner.granularity import PerChannel, PerTensor
from tuner.ops import Op
from tuner.schemes import OpConfig, TensorScheme

_LOOKUPS = ("Embedding",)
_CONVOLUTIONS = ("Conv1d", "Conv2d")
_PRODUCTS = ("Linear", "matmul")


def why_not_integer(op: Op, config: OpConfig) -> str | None:
    """Return why an op's choice is not computed with integers, None where it is."""
    if op.type not in (*_LOOKUPS, *_CONVOLUTIONS, *_PRODUCTS):
        return f"PyTorch has no integer kernel for {op.type} on CPU"
    is_lookup = op.type in _LOOKUPS
    if not is_lookup and (not op.weights or len(op.activations) != 1):
        return "PyTorch has no integer kernel for a product of two activations on CPU"
    if config.is_float:
        return "the plan keeps it in FP32"
    if is_lookup:
        return _why_no_lookup(config.weight)
    if config.weight is None:
        return "integer kernels need a quantized weight as well"
    if op.type in _CONVOLUTIONS and op.input_shapes and len(op.input_shapes[0]) == _axes(op) + 1:
        return "integer convolutions take batches, not one sample without a batch axis"
    reason = why_no_int8(config.weight) or _why_not_axis(op, config.weight)
    scheme = config.input_scheme(op.activations[0])
    if scheme is None:
        return reason or "integer kernels need a quantized input as well"
    return reason or _why_not_input(op, scheme)


def _axes(op: Op) -> int:
    return int(op.type.removeprefix("Conv")[0])


def _why_not_input(op: Op, scheme: TensorScheme) -> str | None:
    if scheme.is_dynamic and op.type in _PRODUCTS:
        return why_not_per_token(scheme)
    return why_not_static(scheme)


def _why_not_axis(op: Op, scheme: TensorScheme) -> str | None:
    reach, axis = scheme.granularity, op.weights[0].axis
    if isinstance(reach, PerTensor):
        return None if axis == 0 else "integer kernels need a scale for each output channel"
    if not isinstance(reach, PerChannel):
        return "integer kernels take one scale for each output channel, not for groups or blocks"
    # an axis from the end and one from the start are the same in a matrix
    if reach.axis != axis and {reach.axis, axis} not in ({1, -1}, {0, -2}):
        return f"integer kernels need scales along axis {axis}, that of the output channels"
    return None


def _why_no_lookup(scheme: TensorScheme | None) -> str | None:
    if scheme is None:
        return "its table is float"
    reason = why_no_int8(scheme)
    if reason is not None:
        return reason
    by_row = isinstance(scheme.granularity, PerTensor) or scheme.granularity == PerChannel(0)
    return None if by_row else "rows of a table need a scale for each row"
