"""Weights lose a bit where sums of two products would not fit 16 bits, and nowhere else."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tuner import OpConfig, PerChannel, TensorScheme
from tuner.errors import SpaceError
from tuner.model import InstrumentedModel
from tuner.narrow_sums import within_sums
from tuner.ops import Op
from tuner.presets import Candidate

W8 = TensorScheme(format="int8", granularity=PerChannel(0))
W7 = W8.model_copy(update={"reduce_range": True})
A8 = TensorScheme(format="uint8", symmetric=False)


class Tied(nn.Module):
    """A table whose weight is that of the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


def ops_of(model: nn.Module, *x: torch.Tensor) -> Mapping[str, Op]:
    instrumented = InstrumentedModel(model.eval())
    return instrumented.record(lambda: model(*x), len(x[0])).ops


def narrowed(
    model: nn.Module,
    x: torch.Tensor,
    options: Mapping[str, Sequence[Candidate]],
    is_exact_at_a_cost: bool = False,
) -> dict[str, list[Candidate]]:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    return within_sums(ops_of(model, x), options, shapes, "openvino", is_exact_at_a_cost)


def weight_of(found: Candidate) -> TensorScheme | None:
    return found.config.weight


def a(bits: int, **options: Any) -> TensorScheme:
    return TensorScheme(format=f"uint{bits}", symmetric=False, **options)


@pytest.mark.parametrize(
    ("weight", "inputs", "expected"),
    [
        (W8, A8, W7),
        (W8, TensorScheme(format="int8"), W7),  # its codes are counted from -128
        (W8, TensorScheme(format="int8", narrow=True), W7),
        (W8, TensorScheme(format="int8", reduce_range=True), W7),  # still 192 at most
        (W8, a(8, reduce_range=True), W8),  # 2 · 127 · 128 = 32,512
        (W8, a(7), W8),
        (W8, a(6), W8),
        (TensorScheme(format="int7", granularity=PerChannel(0)), A8, None),
        (TensorScheme(format="int6", granularity=PerChannel(0)), A8, None),
        (W8, None, W8),
        (W8, TensorScheme(format="e4m3fn"), W8),
        (TensorScheme(format="e4m3fn"), A8, None),
    ],
)
def test_one_bit_less_is_for_sums_that_do_not_fit(
    weight: TensorScheme, inputs: TensorScheme | None, expected: TensorScheme | None
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    options = {"0": [Candidate("any", OpConfig(weight=weight, inputs=inputs))]}
    (found,) = narrowed(model, torch.ones(1, 4), options)["0"]
    assert weight_of(found) == (expected or weight)


def test_labels_tell_of_the_bit() -> None:
    options = {"0": [Candidate("W8A8 dynamic", OpConfig(weight=W8, inputs=A8))]}
    (found,) = narrowed(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4), options)["0"]
    assert found.label == "W7A8 dynamic"


@pytest.mark.parametrize(
    ("layer", "is_narrowed"),
    [
        (nn.Conv2d(4, 4, 3), True),
        (nn.Conv2d(4, 4, 3, groups=2), True),
        (nn.Conv2d(4, 4, 3, groups=4), False),
        (nn.Conv2d(4, 8, 3, groups=4), True),  # two filters for each channel
    ],
)
def test_depthwise_convolutions_keep_their_bits(layer: nn.Module, is_narrowed: bool) -> None:
    options = {"0": [Candidate("W8A8", OpConfig(weight=W8, inputs=A8))]}
    (found,) = narrowed(nn.Sequential(layer), torch.ones(1, 4, 5, 5), options)["0"]
    assert weight_of(found) == (W7 if is_narrowed else W8)


def test_an_unbatched_depthwise_convolution_is_one_all_the_same() -> None:
    options = {"0": [Candidate("W8A8", OpConfig(weight=W8, inputs=A8))]}
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4))
    (found,) = narrowed(model, torch.ones(4, 9), options)["0"]
    assert weight_of(found) == W8


def test_ops_that_share_a_weight_round_it_alike() -> None:
    options = {
        "table": [Candidate("W8", OpConfig(weight=W8))],
        "head": [Candidate("W8A8", OpConfig(weight=W8, inputs=A8))],
    }
    found = narrowed(Tied(), torch.zeros(1, 3, dtype=torch.long), options)
    assert [weight_of(found[name][0]) for name in ("table", "head")] == [W7, W7]


def test_a_rule_for_one_of_two_that_share_a_weight_is_kept_or_refused() -> None:
    options = {
        "table": [Candidate("W8", OpConfig(weight=W8), given=True)],
        "head": [Candidate("W8A8", OpConfig(weight=W8, inputs=A8))],
    }
    x = torch.zeros(1, 3, dtype=torch.long)
    assert narrowed(Tied(), x, options, is_exact_at_a_cost=True) == options
    with pytest.raises(SpaceError, match=r"table .*reduce_range=True"):
        narrowed(Tied(), x, options)


def test_a_slice_of_a_parameter_is_depthwise_by_its_own_shape() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 1, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight[:4], groups=4)

    model, x = Sliced(), torch.ones(1, 4, 5, 5)
    (name,) = ops_of(model, x)
    options = {name: [Candidate("W8A8", OpConfig(weight=W8, inputs=A8))]}
    assert narrowed(model, x, options) == options


def test_a_rule_that_overflows_is_refused_unless_the_target_has_exact_kernels() -> None:
    options = {"0": [Candidate("W8A8", OpConfig(weight=W8, inputs=A8), given=True)]}
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
    with pytest.raises(SpaceError, match=r"'openvino' adds products of W8A8 in 16.*reduce_ran"):
        narrowed(model, x, options)
    assert narrowed(model, x, options, is_exact_at_a_cost=True) == options
    reduced = {"0": [Candidate("W7A8", OpConfig(weight=W7, inputs=A8), given=True)]}
    assert narrowed(model, x, reduced) == reduced


def test_a_product_of_two_activations_overflows_where_the_second_is_signed() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) @ x.mT

    signed = TensorScheme(format="int8")
    model, x = Product(), torch.ones(1, 4, 4)
    (name,) = ops_of(model, x)
    given = {name: [Candidate("A8", OpConfig(inputs=(A8, signed)), given=True)]}
    with pytest.raises(SpaceError, match="input 1, where there is none"):
        narrowed(model, x, given)
    for fits in (A8, signed.model_copy(update={"reduce_range": True})):
        given = {name: [Candidate("A8", OpConfig(inputs=(A8, fits)), given=True)]}
        assert narrowed(model, x, given) == given
