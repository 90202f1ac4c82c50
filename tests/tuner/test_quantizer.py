"""A quantizer's own duties: order in memory, and what copies of it hold."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from tuner.granularity import PerChannel, PerGroup, PerToken
from tuner.qparams import QParams, compute_qparams, fake_quantize
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme

X = torch.randn(4, 6, 8, 10, generator=torch.Generator().manual_seed(0)) * 3
INT8 = TensorScheme(format="int8")
PARTS = {
    "rows of a part": X.permute(0, 2, 1, 3)[..., 2:9],
    "heads": X.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)[:, ::2],
    "expanded": X[:, :1].expand(4, 6, 8, 10),
    "a window": X.flatten(0, 2).as_strided((20, 10), (5, 1)),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("scheme", [INT8, TensorScheme(format="mxfp4")], ids=["int8", "mxfp4"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_parts_of_tensors(part: str, scheme: TensorScheme, with_gradient: bool) -> None:
    x = PARTS[part].detach().requires_grad_(with_gradient)
    assert not x.is_contiguous()
    qparams = QParams(2.0**-5) if scheme is INT8 else None
    y = Quantizer(scheme, qparams)(x)
    assert torch.equal(y, fake_quantize(x.detach().clone(), scheme, qparams))
    assert y.requires_grad == with_gradient
    if with_gradient:
        y.sum().backward()
        assert x.grad is not None


def test_a_part_of_channels_last_stays_so() -> None:
    x = X.to(memory_format=torch.channels_last)[:, :4]
    y = Quantizer(INT8, QParams(2.0**-5))(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, fake_quantize(x.contiguous(), INT8, QParams(2.0**-5)))


def test_the_result_is_never_the_input() -> None:
    x = X.round()
    y = Quantizer(INT8, QParams(1.0))(x)
    assert torch.equal(x, y)
    assert x.data_ptr() != y.data_ptr()


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (INT8, True),
        (TensorScheme(format="e4m3fn"), True),
        (TensorScheme(format="bf16"), True),
        (TensorScheme(format="int8", dynamic=True), False),
        (TensorScheme(format="int8", granularity=PerToken()), False),
        (TensorScheme(format="int8", granularity=PerChannel(1)), False),
        (TensorScheme(format="int8", granularity=PerGroup(2)), False),
        (TensorScheme(format="mxfp4"), False),
        (TensorScheme(format="nf4"), False),
    ],
    ids=lambda value: value.format if isinstance(value, TensorScheme) else None,
)
def test_what_may_come_in_pieces(scheme: TensorScheme, expected: bool) -> None:
    qparams = compute_qparams(X, scheme) if scheme.needs_range else None
    quantizer = Quantizer(scheme, qparams)
    assert quantizer.is_elementwise == expected
    if expected:
        assert torch.equal(torch.cat([quantizer(part) for part in X]), quantizer(X).flatten(0, 1))


@pytest.mark.parametrize("scheme", [INT8, TensorScheme(format="nf4", granularity=PerChannel(1))])
def test_copies_own_what_their_kernels_read(scheme: TensorScheme) -> None:
    """A grid holds addresses of its own structures: a copy must not read the original's."""
    original = Quantizer(scheme, compute_qparams(X, scheme))
    expected: Tensor = original(X)
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    del original
    assert all(not each._grids for each in copies)
    assert all(torch.equal(each(X), expected) for each in copies)
