"""Weights of 7 bits, for kernels that add products of 8-bit codes in 16 bits.

Two products of 255 and 127 do not fit (see tuner.exporters.saturation). With one bit less of the
weight they always do; ONNX Runtime and NNCF offer the same as an option. Weights have a scale for
each channel, and lose less by it than activations would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tuner.errors import SpaceError
from tuner.exporters.saturation import is_depthwise, products_overflow
from tuner.ops import Op
from tuner.presets import Candidate
from tuner.records import describe_config
from tuner.schemes import OpConfig

Shapes = Mapping[str, tuple[int, ...]]

_PRODUCTS = ("Linear", "matmul", "bmm", "Conv")


def within_sums(
    ops: Mapping[str, Op],
    candidates: Mapping[str, Sequence[Candidate]],
    shapes: Shapes,
    target: str,
    is_exact_at_a_cost: bool,
) -> dict[str, list[Candidate]]:
    """Return the candidates, weights without their last bit where sums of products overflow.

    That is for kernels that add two products of codes in 16 bits. `shapes` are those of the
    parameters. Rules keep their options; raises SpaceError where one overflows, unless the target
    has kernels that are exact, if at a cost.
    """
    narrowed = {
        (ref.key, option.config.weight)
        for name, options in candidates.items()
        for option in options
        if not option.given and _overflows(ops[name], option.config, shapes)
        for ref in ops[name].weights
    }
    found: dict[str, list[Candidate]] = {}
    for name, options in candidates.items():
        op = ops[name]
        for option in options:
            if not option.given:
                continue
            shared = {(ref.key, option.config.weight) for ref in op.weights} & narrowed
            if not shared and not _overflows(op, option.config, shapes):
                continue
            if not is_exact_at_a_cost:
                raise SpaceError(
                    f"{name} ({op.type}): target {target!r} adds products of "
                    f"{describe_config(option.config)} in 16 bits on this CPU, which overflow: "
                    "give the weight (or input 1, where there is none) reduce_range=True in the "
                    "rule, or tune for target 'onnxruntime'"
                )
            narrowed -= shared
    for name, options in candidates.items():
        op = ops[name]
        # what shares a weight has it rounded in the same way
        found[name] = [
            _with_fewer_bits(option)
            if not option.given
            and any((r.key, option.config.weight) in narrowed for r in op.weights)
            else option
            for option in options
        ]
    return found


def _overflows(op: Op, config: OpConfig, shapes: Shapes) -> bool:
    """Whether two products of an op's codes do not fit 16 bits."""
    is_product = op.type.rstrip("123d") in _PRODUCTS and op.activations
    if not is_product or _is_depthwise(op, shapes):
        return False
    first = config.input_scheme(op.activations[0])
    second = config.weight if op.weights else config.input_scheme(op.activations[-1])
    if first is None or second is None:
        return False
    if not op.weights and second.quant_range[0] >= 0:  # then its codes are not around zero
        return False
    return products_overflow(first, second)


def _is_depthwise(op: Op, shapes: Shapes) -> bool:
    if not op.type.startswith("Conv") or not op.weights:
        return False
    ref = op.weights[0]
    start, stop = ref.rows or (0, shapes[ref.path][0])
    weight = (stop - start, *shapes[ref.path][1:])
    return is_depthwise(weight, op.input_shapes[0][1 - len(weight)])


def _with_fewer_bits(option: Candidate) -> Candidate:
    weight = option.config.weight
    assert weight is not None
    narrowed = weight.model_copy(update={"reduce_range": True})
    config = option.config.model_copy(update={"weight": narrowed})
    label = option.label.replace(describe_config(option.config), describe_config(config))
    return replace(option, label=label, config=config)
