"""Every function of the numpy runner gives what the ATen op of its name gives."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner.exporters import integer_layers, integer_shapes
from tuner.exporters.integer_constants import as_array
from tuner.exporters.integer_functions import FUNCTIONS
from tuner.exporters.integer_values import Integers

assert integer_layers  # fills the table

aten = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


X, Y, POSITIVE = normal(2, 3, 8), normal(2, 3, 8), normal(2, 3, 8).abs() + 0.1
IMAGE, MASK, ROWS = normal(2, 4, 7, 9), normal(2, 3, 8) > 0, torch.tensor([2, 0, 2])
HIDDEN = torch.where(normal(2, 1, 6, 6) > 1, -torch.inf, 0.0)
Q, K, V = (normal(2, 4, 6, 5) for _ in range(3))

CASES: list[tuple[Any, tuple[Any, ...]]] = [
    *((getattr(aten, name).default, (X * 3,)) for name in (
        "relu", "relu6", "silu", "sigmoid", "tanh", "erf", "exp", "sin", "cos", "hardswish",
        "hardsigmoid", "mish", "abs", "neg", "floor", "round", "sign", "gelu", "elu", "softplus",
        "leaky_relu", "isneginf", "isinf", "isnan", "t", "clone", "detach", "alias",
    ) if name != "t"),
    *((getattr(aten, name).default, (POSITIVE,)) for name in (
        "log", "sqrt", "rsqrt", "reciprocal", "log1p",
    )),
    (aten.gelu.default, (X, "tanh")),
    (aten.erf.default, (torch.linspace(-8, 8, 1001),)),
    (aten.prelu.default, (IMAGE, normal(4))),
    (aten.hardtanh.default, (X, -0.5, 0.7)),
    (aten.clamp.default, (X, -0.5, 0.7)),
    (aten.clamp.default, (X, None, 0.7)),
    (aten.clamp_min.default, (X, 0.1)),
    (aten.softmax.int, (X, -1)),
    (aten.softmax.int, (X, 1)),
    (aten.log_softmax.int, (X, -1)),
    (aten.layer_norm.default, (X, [8], normal(8), normal(8), 1e-5)),
    (aten.layer_norm.default, (X, [3, 8])),
    (aten.rms_norm.default, (X, [8], normal(8), 1e-6)),
    (aten.group_norm.default, (IMAGE, 2, normal(4), normal(4))),
    (aten.batch_norm.default, (IMAGE, normal(4), normal(4), normal(4), POSITIVE[0, 0, :4], False,
                               0.1, 1e-5, True)),
    (aten.add.Tensor, (X, Y)),
    (aten.add.Tensor, (X, 2)),
    (aten.sub.Tensor, (X, Y)),
    (aten.rsub.Scalar, (X, 2)),
    (aten.mul.Tensor, (X, torch.tensor(0.3, dtype=torch.float64))),
    (aten.mul.Tensor, (X, 0.25)),
    (aten.div.Tensor, (X, Y)),
    (aten.div.Tensor_mode, (X, Y)),
    (aten.div.Tensor, (ROWS, 2)),
    (aten.pow.Tensor_Scalar, (X, 2)),
    (aten.maximum.default, (X, Y)),
    (aten.minimum.default, (X, Y)),
    (aten.where.self, (MASK, X, Y)),
    (aten.masked_fill.Scalar, (X, MASK, -torch.inf)),
    *((getattr(aten, name).Tensor, (X, Y)) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    (aten.ge.Scalar, (ROWS, 1)),
    (aten.logical_and.default, (MASK, ~MASK)),
    (aten.logical_or.default, (MASK, ~MASK)),
    (aten.logical_not.default, (MASK,)),
    (aten.bitwise_not.default, (MASK,)),
    (aten.bitwise_and.Tensor, (MASK, MASK)),
    (aten.__and__.Tensor, (MASK, MASK)),
    (aten.mean.dim, (X, [1, 2])),
    (aten.mean.dim, (X, [-1], True)),
    (aten.mean.default, (X,)),
    (aten.sum.dim_IntList, (X, [0])),
    (aten.sum.default, (ROWS,)),
    (aten.amax.default, (X, [1])),
    (aten.amin.default, (X, [1], True)),
    (aten.any.dim, (MASK, 1)),
    (aten.all.dim, (MASK, -1, True)),
    (aten.var.correction, (X, [1])),
    (aten.argmax.default, (X, -1)),
    (aten.cumsum.default, (X, 1)),
    (aten.cumsum.default, (ROWS, 0)),
    (aten.matmul.default, (Q, K.transpose(2, 3))),
    (aten.bmm.default, (X, Y.transpose(1, 2))),
    (aten.mm.default, (X[0], Y[0].T)),
    (aten.linear.default, (X, normal(5, 8), normal(5))),
    (aten.addmm.default, (normal(3), X[0], Y[0].T)),
    (aten.baddbmm.default, (normal(3), X, Y.transpose(1, 2))),
    (aten.einsum.default, ("bij, bkj -> bik", [X, Y])),
    (aten.embedding.default, (normal(4, 3), ROWS)),
    (aten.conv1d.default, (X, normal(6, 3, 3), normal(6), [2], [1])),
    (aten.conv2d.default, (IMAGE, normal(8, 2, 3, 3), normal(8), [2, 1], [1, 0], [1, 2], 2)),
    (aten.conv2d.padding, (IMAGE, normal(8, 4, 4, 3), None, [1, 1], "same")),
    (aten.conv_transpose2d.input, (IMAGE, normal(4, 3, 3, 3), normal(6), [2, 2], [1, 1], [1, 0],
                                   2, [1, 1])),
    (aten.max_pool2d.default, (IMAGE, [3, 3], [2, 2], [1, 1])),
    (aten.max_pool2d.default, (IMAGE, [2, 2], [2, 2], [0, 0], [1, 1], True)),
    (aten.max_pool1d.default, (X, [2])),
    (aten.avg_pool2d.default, (IMAGE, [3, 3], [2, 2], [1, 1])),
    (aten.avg_pool2d.default, (IMAGE, [3, 3], [2, 2], [1, 1], True, False)),
    (aten.avg_pool2d.default, (IMAGE, [3, 2], [2, 2], [1, 1], True, True)),
    (aten.adaptive_avg_pool2d.default, (IMAGE, [1, 1])),
    (aten.adaptive_avg_pool2d.default, (IMAGE, [3, 4])),
    (aten.scaled_dot_product_attention.default, (Q, K, V)),
    (aten.scaled_dot_product_attention.default, (Q, K, V, None, 0.0, True)),
    (aten.scaled_dot_product_attention.default, (Q, K, V, HIDDEN)),
    (aten.scaled_dot_product_attention.default, (Q, K, V, HIDDEN == 0)),
    (aten.view.default, (X, [2, -1])),
    (aten.reshape.default, (X, [6, 8])),
    (aten.flatten.using_ints, (IMAGE, 1, 2)),
    (aten.unflatten.int, (X, 2, [2, 4])),
    (aten.permute.default, (IMAGE, [0, 2, 3, 1])),
    (aten.transpose.int, (X, -1, 1)),
    (aten.t.default, (X[0],)),
    (aten.unsqueeze.default, (X, -1)),
    (aten.squeeze.dim, (X[:1], 0)),
    (aten.squeeze.dims, (X[:1], [0, 1])),
    (aten.expand.default, (X[:1], [4, -1, 8])),
    (aten.expand.default, (X[0], [4, 3, 8])),
    (aten.select.int, (X, 1, -1)),
    (aten.slice.Tensor, (X, 2, 1, 9223372036854775807, 2)),
    (aten.narrow.default, (X, 2, 1, 3)),
    (aten.unbind.int, (X, 1)),
    (aten.split.Tensor, (X, 3, 2)),
    (aten.split_with_sizes.default, (X, [3, 5], 2)),
    (aten.chunk.default, (X, 3, 2)),
    (aten.repeat.default, (X, [2, 1, 1])),
    (aten.repeat_interleave.self_int, (X, 2, 1)),
    (aten.flip.default, (X, [0, 2])),
    (aten.roll.default, (X, [2], [1])),
    (aten.pixel_shuffle.default, (IMAGE, 2)),
    (aten.index_select.default, (X, 1, ROWS)),
    (aten.index.Tensor, (X, [None, ROWS])),
    (aten.gather.default, (X, 1, ROWS.expand(2, 8, 3).transpose(1, 2))),
    (aten.cat.default, ([X, Y], -1)),
    (aten.stack.default, ([X, Y], 1)),
    (aten.pad.default, (X, [1, 2, 0, 1])),
    (aten.pad.default, (X, [1, 2], "reflect")),
    (aten.constant_pad_nd.default, (X, [1, 2], 0.5)),
    (aten._to_copy.default, (X,)),
    (aten.to.dtype, (X, torch.int64)),
    (aten.type_as.default, (ROWS, X)),
    (aten.triu.default, (X, 1)),
    (aten.tril.default, (X, -1)),
    (aten.ones.default, ([2, 3],)),
    (aten.new_ones.default, (ROWS, [2])),
    (aten.zeros_like.default, (X,)),
    (aten.full.default, ([2], 0.5)),
    (aten.full_like.default, (X, 0.5)),
    (aten.arange.default, (5,)),
    (aten.arange.start_step, (1, 9, 2)),
    (aten.scalar_tensor.default, (0.5,)),
    (aten.upsample_nearest2d.default, (IMAGE, [14, 12])),
    *((aten.upsample_nearest2d.vec, (IMAGE, None, [s, s])) for s in (0.7, 1.1, 1.3, 2.0, 2.5, 3.3)),
    *((aten.upsample_nearest2d.default, (IMAGE, [n, n + 3])) for n in range(3, 60, 4)),
    *((aten.constant_pad_nd.default, (X, pad, 2.0)) for pad in ([-1, 2], [1, -2, -1, -1])),
    *((aten.round.decimals, (X, d)) for d in (1, 2, -1)),
]  # fmt: skip


def given(value: Any) -> Any:
    if isinstance(value, Tensor):
        return as_array(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return [given(each) for each in value] if isinstance(value, list) else value


def named(op: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    names = [argument.name for argument in op._schema.arguments]
    return {n: given(v) for n, v in zip(names, args, strict=False) if v is not None}


@pytest.mark.parametrize(("op", "args"), CASES, ids=lambda v: str(v) if callable(v) else "")
def test_a_function_is_that_of_aten(op: Any, args: tuple[Any, ...]) -> None:
    extra = {"rounding_mode": "floor"} if op is aten.div.Tensor_mode else {}
    schema = [argument.name for argument in op._schema.arguments]
    expected = op(**dict(zip(schema, args, strict=False)), **extra)
    found = FUNCTIONS[op._schema.name.removeprefix("aten::")](**named(op, args), **extra)
    if isinstance(expected, Tensor):
        expected, found = [expected], [found]
    assert len(expected) == len(found)
    for e, f in zip(expected, found, strict=True):
        f = torch.from_numpy(np.array(f))
        assert f.shape == e.shape
        assert f.dtype == e.dtype
        torch.testing.assert_close(f, e, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_a_move_does_to_codes_what_it_does_to_values() -> None:
    codes = np.arange(24).reshape(2, 3, 4)
    scale = np.asarray([0.5, 1.0, 2.0]).reshape(1, 3, 1)
    integers = Integers(codes, scale, np.asarray(3))
    split = integer_shapes.MOVES["unbind"]
    moved = integers.moved(lambda x: split(x, 1))
    expected = split(integers.floats(), 1)
    assert all(np.array_equal(m.floats(), e) for m, e in zip(moved, expected, strict=True))


def test_most_functions_have_a_case() -> None:
    tried = {op._schema.name.removeprefix("aten::") for op, _ in CASES}
    assert len(tried) >= 120
