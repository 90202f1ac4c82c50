"""What sweep() puts on odd models, and what becomes of a format that cannot be put on."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import Autoencoder, Mirrored, Pooling, inputs_for
from tuner import OpConfig, PerChannel, Rule, TensorScheme, formats, quantization
from tuner.errors import SchemeError, SpaceError

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
A8 = TensorScheme(format="int8")
W8 = TensorScheme(format="int8", granularity=PerChannel(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False)).eval()


def one(model: nn.Module) -> float:
    return 1.0


def swept(net: nn.Module, given: Any, x: Tensor = X, **options: Any) -> dict[Any, Tensor]:
    """Return the outputs on x that eval_func saw, by (format, part), of rows without an error."""
    outputs: list[Tensor] = []

    def eval_func(model: nn.Module) -> float:
        with torch.no_grad():
            outputs.append(model(x))
        return 1.0

    result = quantization.sweep(net, [x], eval_func, given, progress=False, **options)
    keys = [(row.format, row.part) for row in result.rows if row.error is None]
    return dict(zip(keys, outputs[1:], strict=True))


# ---------------------------------------------------------------- shared weights and vectors


@pytest.mark.parametrize("net_type", [Autoencoder, Mirrored])
def test_a_weight_with_two_axes_takes_the_scales_of_its_first_use(
    net_type: type[nn.Module],
) -> None:
    net = net_type()
    x = inputs_for(net)
    seen = swept(net, ["int8"], x)
    assert set(seen) == {("int8", part) for part in ("weights", "inputs", "both")}
    sim = quantization.simulate(net, weights=W8, calib_dataloader=[x])
    with torch.no_grad():
        assert torch.equal(seen["int8", "weights"], sim(x))


def test_a_vector_has_one_scale() -> None:
    net = Pooling()
    seen = swept(net, ["int8"], parts=["weights"])
    scale = float(net.v.detach().abs().max() / 127)
    v8 = torch.fake_quantize_per_tensor_affine(net.v.detach(), scale, 0, -128, 127)
    assert not torch.equal(v8, net.v)
    assert torch.allclose(seen["int8", "weights"], X @ v8, atol=1e-6)


# ---------------------------------------------------------------- parts and biases


def test_what_no_part_asks_for_is_not_calibrated() -> None:
    scheme = TensorScheme(format="int4", granularity=PerChannel(0))  # of inputs: of each sample
    result = quantization.sweep(mlp(), [X, X[:7]], one, [scheme], parts=["weights"], progress=False)
    assert [row.error for row in result.rows] == [None]


def test_biases_are_quantized_where_there_are_any_with_both() -> None:
    net, config = mlp(), OpConfig(weight=W8, inputs=A8, bias=TensorScheme(format="int32"))
    seen = swept(net, [("mine", config)])
    data = {"calib_dataloader": [X]}
    rule = Rule(names=["0"], options=[config])
    expected = {
        "weights": quantization.simulate(net, weights=W8, **data),
        "inputs": quantization.simulate(net, A8, **data),
        "both": quantization.simulate(net, A8, W8, rules=[rule], **data),
    }
    with torch.no_grad():
        for part, sim in expected.items():
            assert torch.equal(seen["mine", part], sim(X))
    assert "bias int32" in str(expected["both"])


def test_a_bias_alone_is_a_row() -> None:
    config = OpConfig(bias=TensorScheme(format="int8"))
    result = quantization.sweep(mlp(), [X], one, [("mine", config)], progress=False)
    assert [(row.part, row.bits, row.error) for row in result.rows] == [("both", 8, None)]


# ---------------------------------------------------------------- what goes wrong


def test_a_weight_without_the_axis_is_refused_before_anything_is_evaluated() -> None:
    calls: list[nn.Module] = []
    scheme = TensorScheme(granularity=PerChannel(5))
    with pytest.raises(SchemeError, match=r"^0, weight: .*axis 5 does not exist"):
        quantization.sweep(
            mlp(),
            [X],
            lambda m: float(calls.append(m) is None),
            ["int8", ("w", OpConfig(weight=scheme))],
        )
    assert not calls


def test_an_op_with_fewer_operands_is_refused_before_anything_is_evaluated() -> None:
    calls: list[nn.Module] = []
    with pytest.raises(SpaceError, match="has 1 input operands, but 2"):
        quantization.sweep(
            mlp(), [X], lambda m: float(calls.append(m) is None), [("a", OpConfig(inputs=(A8, A8)))]
        )
    assert not calls


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a format that cannot round the second weight of mlp()."""

    def forward(x: Tensor) -> Tensor:
        if x.shape == (4, 12):
            raise ZeroDivisionError("no such grid")
        return x.round()

    monkeypatch.setattr(formats, "_TABLE", dict(formats._TABLE))
    return formats.register("refusing", forward=forward).name


def test_a_format_that_cannot_be_put_on_is_a_row_and_leaves_nothing_behind(refusing: str) -> None:
    result = quantization.sweep(mlp(), [X], one, [refusing], progress=False)
    assert [row.part for row in result.rows if row.error is None] == ["inputs"]
    assert {row.reason for row in result.rows if row.error} == {"ZeroDivisionError: no such grid"}
    assert not swept(mlp(), [refusing], parts=["weights", "both"])
    seen = swept(mlp(), [refusing, "int8", "fp32"])
    alone = swept(mlp(), ["int8"])
    for key, output in alone.items():
        assert torch.equal(seen[key], output)
    with torch.no_grad():
        assert torch.equal(seen["fp32", "weights"], mlp()(X))
        rounded = quantization.simulate(mlp(), refusing)(X)
    assert torch.equal(seen[refusing, "inputs"], rounded)


def test_ctrl_c_brings_the_rows_so_far() -> None:
    calls = iter(range(9))

    def eval_func(model: nn.Module) -> float:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt) as interrupt:
        quantization.sweep(mlp(), [X], eval_func, progress=False)
    result: Any = interrupt.value.sweep_result  # type: ignore[attr-defined]
    assert [row.part for row in result.rows] == ["weights", "inputs"]
    assert result.baseline == 1.0
