"""Plans on a model: put on, changed, taken off."""

import copy

import pytest
import torch
from torch import nn

from tests.tuner.nets import (
    ALL,
    Attention,
    ConvNet,
    Encoder,
    Functional,
    Tied,
    inputs_for,
    main_output,
    seeded,
)
from tuner.errors import PlanError
from tuner.granularity import PerChannel
from tuner.model import InstrumentedModel
from tuner.observe import CalibratedRanges, Observer
from tuner.ops import Op
from tuner.ranges import QParams
from tuner.schemes import OpConfig, TensorScheme

W8 = TensorScheme(format="int8", granularity=PerChannel(0))
W4 = TensorScheme(format="int4", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)


class FixedRange:
    """Every activation lies in [−4, 4)."""

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        return QParams(2.0**-5, 128 if scheme.format == "uint8" else None)


def instrumented(net: nn.Module) -> tuple[InstrumentedModel, torch.Tensor]:
    x = inputs_for(net)
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(x), len(x)).ops, FixedRange())
    return model, x


def full(op: Op, weight: TensorScheme = W8, inputs: TensorScheme = A8) -> OpConfig:
    last = max(op.activations, default=-1) + 1
    return OpConfig(
        weight=weight if op.weights else None,
        inputs=tuple(inputs if i in op.activations else None for i in range(last)) or None,
    )


def _tied_to(model: InstrumentedModel, op: Op) -> list[str]:
    keys = {ref.key for ref in op.weights}
    return [
        name
        for name, other in model.ops.items()
        if name == op.name or keys & {ref.key for ref in other.weights}
    ]


@pytest.mark.parametrize("net_type", ALL)
def test_every_op_takes_effect_alone_and_leaves_no_trace(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    model, x = instrumented(net)
    coarse = TensorScheme(format="int2"), TensorScheme(format="uint8", symmetric=False)
    with torch.no_grad():
        reference = main_output(net(x))
        for op in model.ops.values():
            model.apply({n: full(model.ops[n], *coarse) for n in _tied_to(model, op)})
            assert not torch.equal(main_output(net(x)), reference), op.name
            if op.name in model.runtime.sites:
                assert model.runtime.sites[op.name].calls > 0
        model.apply({})
        assert torch.equal(main_output(net(x)), reference)
    assert all(type(m).__name__ and not hasattr(m, "_tuner_path") for m in net.modules())


def test_linear_and_conv_equal_torchs_own_fake_quantization() -> None:
    net = seeded(ConvNet)
    model, x = instrumented(net)
    model.apply({"conv": full(model.ops["conv"])})
    scale = net.conv.weight.detach()
    seen = torch.fake_quantize_per_tensor_affine(x, 2.0**-5, 128, 0, 255)
    reference = seeded(ConvNet).conv
    amax = reference.weight.detach().abs().amax((1, 2, 3))
    weight = torch.fake_quantize_per_channel_affine(
        reference.weight.detach(), amax / 127, torch.zeros(8, dtype=torch.int32), 0, -128, 127
    )
    with torch.no_grad():
        expected = nn.functional.conv2d(seen, weight, padding=1)
        assert torch.allclose(net.conv(x), expected, atol=1e-5)
    assert not torch.equal(scale, reference.weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 16, "vdim": 16},
    ],
)
def test_attention_taken_apart_equals_torchs(options: dict[str, object]) -> None:
    net = seeded(Attention, **options)
    if "kdim" in options:  # separate projections, as torch has them for other widths
        attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=10, batch_first=True).eval()
        query, key, value = torch.randn(2, 5, 16), torch.randn(2, 6, 12), torch.randn(2, 6, 10)
        calls = [((query, key, value), {}), ((query[0], key[0], value[0]), {})]
    else:
        attention = net.attention
        x = torch.randn(2, 5, 16)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[0, 3:] = True
        calls = [
            ((x, x, x), {}),
            ((x[0], x[0], x[0]), {"average_attn_weights": False}),
            ((x, x, x), {"attn_mask": causal, "is_causal": True, "need_weights": False}),
            ((x, x, x), {"key_padding_mask": padding, "attn_mask": causal < 0}),
            ((x, x, x), {"attn_mask": torch.randn(8, 5, 5)}),
        ]
    expected = [attention(*args, **kwargs) for args, kwargs in calls]
    model = InstrumentedModel(attention)
    for (args, kwargs), (output, weights) in zip(calls, expected, strict=True):
        seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        model.record(lambda a=args, k=kwargs, s=seen: s.append(attention(*a, **k)), 2)  # type: ignore[misc]
        assert torch.allclose(seen[0][0], output, atol=1e-5)
        assert (seen[0][1] is None) == (weights is None)
        assert weights is None or torch.allclose(seen[0][1], weights, atol=1e-5)


def test_switching_touches_only_what_differs_and_quantizes_once() -> None:
    net = seeded(ConvNet)
    model, _ = instrumented(net)
    configs = {name: full(op) for name, op in model.ops.items()}
    model.apply(configs)
    storages = {name: p.data_ptr() for name, p in net.named_parameters()}
    sites = dict(model.runtime.sites)
    model.apply({**configs, "head": full(model.ops["head"], W4)})
    moved = {n for n, p in net.named_parameters() if p.data_ptr() != storages[n]}
    assert moved == {"head.weight"}
    assert all(model.runtime.sites[n] is site for n, site in sites.items())
    model.apply(configs)
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == storages


def test_tied_weights_keep_one_storage() -> None:
    net = seeded(Tied)
    model, _ = instrumented(net)
    config = {"embed": full(model.ops["embed"], W4), "head": full(model.ops["head"], W4)}
    model.apply(config)
    assert net.head.weight is net.embed.weight
    assert len(net.embed.weight.detach()[0].unique()) <= 16
    with pytest.raises(PlanError, match="share"):
        model.apply({**config, "head": full(model.ops["head"], W8)})


def test_instance_class_and_state_dict_survive() -> None:
    net = seeded(Functional)
    keys = list(net.state_dict())
    model, _ = instrumented(net)
    model.apply({name: full(op) for name, op in model.ops.items()})
    assert isinstance(net, Functional)
    assert type(net).__name__ == "Functional"
    assert list(net.state_dict()) == keys


def test_encoder_is_quantized_without_grad_in_eval() -> None:
    net = seeded(Encoder)
    model, x = instrumented(net)
    with torch.no_grad():
        reference = net(x)
        model.apply({"encoder.layers.0.linear1": OpConfig(weight=TensorScheme(format="int2"))})
        assert not torch.allclose(net(x), reference, atol=1e-3)


def test_deepcopy_of_a_quantized_model_computes_the_same() -> None:
    net = seeded(Functional)
    model, x = instrumented(net)
    model.apply({name: full(op) for name, op in model.ops.items()})
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(net)(x), net(x))


def _error_when_quantized(net_type: type[nn.Module], dtype: torch.dtype) -> float:
    net = seeded(net_type).to(dtype)
    x = inputs_for(net).to(dtype)
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(x), len(x)).ops, FixedRange())
    with torch.no_grad():
        reference = net(x).float()
        model.apply({name: full(op) for name, op in model.ops.items()})
        quantized = net(x)
    assert quantized.dtype == dtype
    return float((quantized.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("net_type", [ConvNet, Functional, Attention])
def test_other_dtypes_err_as_float32_does(net_type: type[nn.Module], dtype: torch.dtype) -> None:
    error = _error_when_quantized(net_type, torch.float32)
    assert error > 0
    assert _error_when_quantized(net_type, dtype) == pytest.approx(error, rel=0.25)


def test_unknown_op_is_refused() -> None:
    model, _ = instrumented(seeded(ConvNet))
    with pytest.raises(PlanError, match=r"conv9.*another architecture"):
        model.apply({"conv9": OpConfig(weight=W8)})


def test_calls_from_outside_the_root_are_quantized_too() -> None:
    """A user may call a submodule, or a method of his own, rather than the model."""
    net = nn.Sequential(seeded(Functional), nn.Linear(16, 4))
    x = inputs_for(seeded(Functional))
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(x), len(x)).ops, FixedRange())
    with torch.no_grad():
        reference = net[0](x)
        model.apply({"0/bmm:0": OpConfig(inputs=(TensorScheme(format="int2"),) * 2)})
        assert not torch.equal(net[0](x), reference)


def test_one_summary_serves_the_ops_that_share_an_input() -> None:
    net = seeded(Attention)
    model, x = instrumented(net)
    parts = [f"attention/{p}_proj" for p in "qkv"]
    observer = Observer({name: ((0, A8),) for name in parts})
    with torch.no_grad(), model.watching(observer):
        net(x)
    summaries = {id(observer.statistics[name, 0].overall.histogram) for name in parts}
    values = [observer.statistics[name, 0] for name in parts]
    assert {s.minimum for s in values} == {float(x.min())}
    assert {s.maximum for s in values} == {float(x.max())}
    assert summaries
    ranges = CalibratedRanges(observer)
    qparams = [ranges.qparams(name, 0, A8) for name in parts]
    assert len({float(q.scale) for q in qparams}) == 1
