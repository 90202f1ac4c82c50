"""Bytes and bit operations, against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from tests.tuner.nets import Attention, ConvNet, Recurrent, Tied, inputs_for, seeded
from tuner.costs import CostModel
from tuner.granularity import PerChannel, PerGroup
from tuner.model import InstrumentedModel
from tuner.schemes import OpConfig, TensorScheme

W4 = TensorScheme(format="int4", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)
A6 = TensorScheme(format="uint6", symmetric=False)


def cost_model(net: nn.Module) -> CostModel:
    x = inputs_for(net)
    graph = InstrumentedModel(net).record(lambda: net(x), len(x))
    return CostModel(net, graph)


def test_float_model() -> None:
    costs = cost_model(seeded(ConvNet)).costs({})
    macs = 8 * 8 * 8 * 9 + 6 * 6 * 8 * 9 + 8 * 5
    assert costs.bops == macs * 32 * 32
    state = seeded(ConvNet).state_dict().values()
    assert costs.size_bytes == sum(t.nbytes for t in state) == 261 * 4 + 2 * 8


def test_quantized_conv() -> None:
    model = cost_model(seeded(ConvNet))
    plan = {"conv": OpConfig(weight=W4, inputs=(A8,))}
    before, after = model.costs({}), model.costs(plan)
    conv = 8 * 8 * 8 * 9
    assert before.bops - after.bops == conv * (32 * 32 - 4 * 8)
    # 72 codes of 4 bits, 8 scales, one activation scale and zero point
    assert before.size_bytes - after.size_bytes == 72 * 4 - (36 + 8 * 4 + 8)


def test_tied_weight_counts_once() -> None:
    model = cost_model(seeded(Tied))
    plan = {"embed": OpConfig(weight=W4), "head": OpConfig(weight=W4)}
    saved = model.costs({}).size_bytes - model.costs(plan).size_bytes
    assert saved == 320 * 4 - (160 + 20 * 4)


def test_recurrent_products_inside_stay_float() -> None:
    model = cost_model(seeded(Recurrent))
    first = 2 * 9 * 64 * 8
    saved = model.costs({}).bops - model.costs({"lstm": OpConfig(weight=W4, inputs=(A8,))}).bops
    rest = 2 * 9 * 64 * 16 + 2 * 9 * (64 * 32 + 64 * 16)
    assert saved == first * (1024 - 32) + rest * (1024 - 4 * 32)


def test_activation_products_multiply_their_own_widths() -> None:
    model = cost_model(seeded(Attention))
    macs = 4 * 7 * 7 * 4
    saved = (
        model.costs({}).bops - model.costs({"attention/matmul:1": OpConfig(inputs=(A8, A6))}).bops
    )
    assert saved == macs * (1024 - 48)


@pytest.mark.parametrize(("size", "scales"), [(4, 2), (5, 2), (8, 1), (100, 1)])
def test_ragged_groups(size: int, scales: int) -> None:
    model = cost_model(seeded(ConvNet))
    grouped = TensorScheme(format="int4", granularity=PerGroup(size, 1))
    saved = model.costs({}).size_bytes - model.costs({"head": OpConfig(weight=grouped)}).size_bytes
    assert saved == 40 * 4 - (20 + 5 * scales * 4)


@pytest.mark.parametrize(
    ("weight", "inputs", "product", "codes", "scales", "parameters"),
    [
        ("e4m3fn", "e5m2", 64, 40, 4, 4),  # an input scale, no zero point
        ("mxfp4", "mxfp8_e4m3", 32, 20, 5, 0),
        ("nvfp4", "nvfp4", 16, 20, 5 + 4, 0),
        ("nf4", None, 4 * 32, 20, 5 * 4, 0),
        ("abfp6", None, 6 * 32, 30, 5 * 2, 0),
        ("fp16", "bf16", 256, 80, 0, 0),
        ("mxfp6_e2m3", "uint8", 48, 30, 5, 8),
    ],
)
def test_formats_cost_the_bits_of_their_elements_and_their_scales(
    weight: str, inputs: str | None, product: int, codes: int, scales: int, parameters: int
) -> None:
    model = cost_model(seeded(ConvNet))
    scheme = None if inputs is None else (TensorScheme(format=inputs),)
    config = OpConfig(weight=TensorScheme(format=weight), inputs=scheme)
    before, after = model.costs({}), model.costs({"head": config})
    assert before.bops - after.bops == 40 * (32 * 32 - product)
    assert before.size_bytes - after.size_bytes == 40 * 4 - (codes + scales + parameters)


def test_uncovered_macs_count_as_float() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensordot(self.linear(x), x, dims=([1], [1]))

    net, x = Odd(), torch.randn(4, 6)
    graph = InstrumentedModel(net).record(lambda: net(x), 4)
    assert CostModel(net, graph).costs({}).bops == (36 + 24) * 1024
