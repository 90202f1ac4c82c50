"""A trainable model on every kind of network: what it computes, trains, counts and becomes."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from tests.tuner.nets import (
    ALL,
    ConvNet,
    Functional,
    Tied,
    inputs_for,
    main_output,
    seeded,
)
from tests.tuner.training.tasks import (
    INPUTS,
    METHODS,
    WEIGHTS,
    Perceptron,
    batches,
    evaluated,
    prepared,
    same_state,
    step,
    train,
)
from tuner import OpConfig, PerChannel, PerGroup, PerTensor, Plan, Rule, TensorScheme, quantization
from tuner.qparams import fake_quantize
from tuner.trainable_model import parameter_groups
from tuner.trainable_preparation import prepare_qat

FP32 = {"rtol": 1e-5, "atol": 1e-6}
OUTPUTS = TensorScheme(format="int8")


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # Branching
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net_type", ALL, ids=lambda t: t.__name__)
class TestEveryNetwork:
    def test_trains_and_becomes_a_quantized_model_of_the_same_outputs(
        self, net_type: type[nn.Module], method: str, tmp_path: Path
    ) -> None:
        net = seeded(net_type)
        batch = inputs_for(net)
        model = prepared(net, [batch], method=method, outputs=OUTPUTS)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, [batch] * 3)
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert all("never" in name for name in idle)
        assert {name for name, p in model.named_parameters() if p.grad is not None} >= set(moved)
        assert int(model.steps) == 3
        expected = evaluated(model, batch)
        frozen = model.to_quantized()
        assert torch.equal(evaluated(frozen, batch), expected)
        frozen.save(tmp_path)
        loaded = quantization.load(tmp_path, seeded(net_type))
        assert torch.equal(evaluated(loaded, batch), expected)

    def test_training_goes_on_bit_for_bit_from_a_checkpoint(
        self, net_type: type[nn.Module], method: str
    ) -> None:
        net = seeded(net_type)
        data = [inputs_for(net, samples) for samples in (8, 6, 8, 6)]
        options = {"method": method, "outputs": OUTPUTS, "quant_start_step": 1}
        straight = prepared(net, data[:1], **options)
        train(straight, data)
        first = prepared(net, data[:1], **options)
        optimizer = train(first, data[:2])
        checkpoint = io.BytesIO()
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
        checkpoint.seek(0)
        stored = torch.load(checkpoint, weights_only=True)
        resumed = prepared(net, data[:1], **options)
        resumed.load_state_dict(stored["model"])
        optimizer = torch.optim.Adam(parameter_groups(resumed, 1e-2))
        optimizer.load_state_dict(stored["optimizer"])
        for batch in data[2:]:
            step(resumed, optimizer, batch)
        assert same_state(straight, resumed)
        assert torch.equal(evaluated(straight, data[0]), evaluated(resumed, data[0]))

    def test_the_users_model_is_not_touched(self, net_type: type[nn.Module], method: str) -> None:
        net = seeded(net_type)
        batch = inputs_for(net)
        before, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
        random = torch.get_rng_state()
        model = prepared(net, [batch], method=method)
        assert torch.equal(random, torch.get_rng_state())
        train(model, [batch])
        assert [type(m) for m in net.modules()] == classes
        assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
        assert not any(m.training for m in net.modules())


class TestForward:
    @pytest.mark.parametrize("name", ["int4", "int2", "e2m1", "mxfp4"])
    def test_a_linear_layer_is_its_rounded_parts(self, name: str) -> None:
        net = nn.Linear(32, 5)
        x = torch.randn(4, 32)
        scheme = TensorScheme(format=name)
        model = prepare_qat(net, calib_dataloader=[x], inputs=scheme, weights=scheme)
        expected = F.linear(fake_quantize(x, scheme), fake_quantize(net.weight, scheme), net.bias)
        torch.testing.assert_close(model(x), expected, **FP32)

    def test_gradients_of_a_layer_pass_inside_the_ranges_only(self) -> None:
        net = nn.Linear(4, 3)
        scheme = TensorScheme(format="int3", granularity=PerChannel(0))
        model = prepare_qat(net, weights=scheme, method="lsq")
        scale = next(iter(model.scales().values()))
        with torch.no_grad():
            scale.mul_(0.4)  # so that weights are outside
        x = torch.randn(6, 4)
        model(x).sum().backward()
        v = net.weight / scale.detach().unsqueeze(1)
        inside = (v >= -4) & (v <= 3)
        assert not inside.all()
        assert inside.any()
        (weight,) = (p for n, p in model.model.named_parameters() if n == "weight")
        torch.testing.assert_close(weight.grad, torch.where(inside, x.sum(0).expand(3, 4), 0.0))

    def test_warm_up_counts_optimizer_steps_and_averages_ranges(self) -> None:
        model = prepared(Perceptron(), None, quant_start_step=2)
        plain = copy.deepcopy(model.model)
        data = batches()
        range_ = model.quantizers["first:input0"]
        lows = []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for index, batch in enumerate(data):
            assert model.is_quantizing is (index >= 2)
            output = model(batch)
            float_output = F.linear(
                torch.relu(F.linear(batch, plain.first.weight, plain.first.bias)),
                plain.second.weight,
                plain.second.bias,
            )
            assert torch.equal(output, float_output) is (index < 2)
            lows.append(float(range_.low))  # type: ignore[arg-type]
            output.sum().backward()
            optimizer.step()
        expected = float(data[0].min())
        for batch, low in zip(data, lows, strict=True):
            expected = 0.99 * expected + 0.01 * float(batch.min())
            assert low == pytest.approx(expected)

    def test_in_eval_mode_it_is_quantized_and_ranges_rest_whatever_the_warm_up(self) -> None:
        data = batches()
        model = prepared(Perceptron(), data, quant_start_step=10)
        before = copy.deepcopy(model.quantizers.state_dict())
        quantized = evaluated(model, data[0] * 3)
        model.train()
        assert not torch.equal(quantized, model(data[0] * 3))
        model.eval()
        model.load_state_dict({**model.state_dict()})
        model.quantizers.load_state_dict(before)
        model.quantizers.train()  # the mode of the op's own module counts
        evaluated(model.model, data[0] * 3)
        after = model.quantizers.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_gradient_accumulation_counts_steps_and_not_calls(self) -> None:
        model = prepared(Perceptron(), batches())
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1))
        for index, batch in enumerate(batches(6)):
            model(batch).sum().backward()
            if index % 3 == 2:
                optimizer.step()
        assert int(model.steps) == 2

    def test_two_optimizers_make_one_step_and_strangers_none(self) -> None:
        model = prepared(Perceptron(), batches(), method="lsq")
        weights = torch.optim.SGD(model.model.parameters(), lr=0.1)
        scales = torch.optim.Adam(model.scales().values(), lr=0.01)
        stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        for index, batch in enumerate(batches(3)):
            model(batch).sum().backward()
            stranger.step()
            assert int(model.steps) == index
            weights.step()
            scales.step()
            assert int(model.steps) == index + 1
        model.count_step()
        assert int(model.steps) == 4

    def test_a_shared_model_keeps_its_hooks_and_methods(self) -> None:
        model = prepared(Perceptron(), batches())
        seen: list[torch.Size] = []
        model.model.second.register_forward_hook(lambda m, a, y: seen.append(y.shape))  # type: ignore[union-attr, operator]
        assert isinstance(model.model, Perceptron)
        assert isinstance(model.model.second, nn.Linear)
        model(batches()[0])
        assert seen == [torch.Size([8, 3])]


class TestPlans:
    def test_bits_differ_by_rule(self) -> None:
        rule = Rule(names=["second"], options=[OpConfig(weight=TensorScheme(format="int2"))])
        model = prepared(Perceptron(), batches(), method="lsq", rules=[rule])
        bits = {(r.name, r.operand): r.bits for r in model.learned_ranges()}
        assert bits == {
            ("first.weight", "weight"): 4,
            ("first", "input 0"): 8,
            ("second.weight", "weight"): 2,
        }

    def test_inputs_weights_and_outputs_have_scales_of_their_own(self) -> None:
        model = prepared(seeded(Functional), [inputs_for(seeded(Functional))], method="lsq")
        names = set(model.quantizers)
        assert {"/bmm:0:input0", "/bmm:0:input1"} <= names
        attention = {f"/scaled_dot_product_attention:0:input{i}" for i in range(4)}
        assert attention <= names
        assert {
            f"weight:{name}" for name in ("w", "k", "qkv[0:16]", "qkv[16:32]", "qkv[32:48]")
        } <= names

    def test_a_tied_weight_has_one_scale_and_gradients_of_both_uses(self) -> None:
        net = seeded(Tied)
        model = prepared(net, [inputs_for(net)], method="lsq")
        inner = model.model
        assert inner.head.weight is inner.embed.weight
        assert [name for name in model.scales() if "weight" in name] == [
            "quantizers.weight:embed/weight.scale",
            "quantizers.weight:body/weight.scale",
        ]
        main_output(model(inputs_for(net))).sum().backward()
        with_both = inner.embed.weight.grad.clone()
        model.zero_grad()
        inner.embed(inputs_for(net)).sum().backward()
        assert not torch.equal(with_both, inner.embed.weight.grad)

    def test_convolution_and_norm_are_folded_as_the_paper_says(self) -> None:
        net = seeded(ConvNet)
        batch = inputs_for(net)
        model = prepared(net, [batch])
        norm, layer = net.bn, net.conv
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        folded = model.model.conv
        torch.testing.assert_close(folded.weight, layer.weight * factor.view(-1, 1, 1, 1), **FP32)
        torch.testing.assert_close(folded.bias, norm.bias - norm.running_mean * factor, **FP32)
        before = norm.running_mean.clone()
        train(model, [batch])
        assert torch.equal(model.model.bn.running_mean, before)
        assert not any(p.requires_grad for p in model.model.bn.parameters())

    def test_a_bias_is_rounded_too(self, tmp_path: Path) -> None:
        config = OpConfig(weight=WEIGHTS, inputs=INPUTS, bias=TensorScheme(format="int32"))
        net = Perceptron()
        for method in METHODS:
            plan = Plan({"first": config, "second": config})
            model = prepare_qat(net, plan, batches(), method=method)
            train(model, batches())
            expected = evaluated(model, batches()[0])
            assert torch.equal(evaluated(model.to_quantized(), batches()[0]), expected)
            model.to_quantized().save(tmp_path / method)
            loaded = quantization.load(tmp_path / method, net)
            assert torch.equal(evaluated(loaded, batches()[0]), expected)

    @pytest.mark.parametrize("granularity", [PerChannel(-1), PerGroup(4)], ids=str)
    @pytest.mark.parametrize("method", METHODS)
    def test_activations_with_scales_along_an_axis(self, granularity: object, method: str) -> None:
        scheme = TensorScheme(format="int4", granularity=granularity)
        model = prepared(Perceptron(), batches(), inputs=scheme, method=method)
        train(model, batches())
        expected = evaluated(model, batches()[0])
        assert torch.equal(evaluated(model.to_quantized(), batches()[0]), expected)

    def test_another_format_flows_back(self) -> None:
        scheme = TensorScheme(format="int8", backward_format="e2m1")
        x = torch.randn(5, 4, requires_grad=True)
        model = prepare_qat(nn.Linear(4, 4), calib_dataloader=[x.detach()], inputs=scheme)
        model(x).backward(torch.randn(5, 4))
        assert x.grad is not None
        span = float(x.grad.abs().max())
        codes = x.grad.abs() / span * 6
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
        assert float((codes.unsqueeze(-1) - grid).abs().amin(-1).max()) < 1e-5

    @pytest.mark.parametrize("method", METHODS)
    def test_a_fitted_model_goes_on_from_its_plan(self, method: str, tmp_path: Path) -> None:
        net = seeded(ConvNet)
        batch = inputs_for(net)
        fitted = quantization.fit(net, [batch], progress=False)
        fitted.save(tmp_path)
        for source in (fitted, quantization.load(tmp_path, net)):
            before = evaluated(source, batch)
            model = prepare_qat(source, method=method)
            assert model.is_ready
            start = evaluated(model, batch)
            torch.testing.assert_close(start, before, rtol=0.05, atol=0.05)
            train(model, [batch])
            assert torch.equal(evaluated(source, batch), before)
            frozen = model.to_quantized()
            assert frozen.plan.keys() == fitted.plan.keys()
            assert "trained for 1 steps" in frozen.result.best.reason

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        "scheme",
        [
            TensorScheme(format="int4", symmetric=False, granularity=PerGroup(4)),
            TensorScheme(format="uint4", granularity=PerGroup(3, 0)),
            TensorScheme(format="int3", narrow=True, power_of_two_scale=True),
            TensorScheme(format="e2m1", granularity=PerChannel(0)),
            TensorScheme(format="e4m3fn"),
            TensorScheme(format="mxfp4"),
            TensorScheme(format="bf16"),
        ],
        ids=str,
    )
    def test_weights_and_inputs_of_every_kind(
        self, scheme: TensorScheme, method: str, tmp_path: Path
    ) -> None:
        net = Perceptron()
        inputs = scheme.model_copy(update={"granularity": PerTensor()})
        learns = {"inputs": inputs, "outputs": "int8"}  # so that there is a scale to learn
        model = prepared(net, batches(), weights=scheme, method=method, **learns)
        train(model, batches())
        expected = evaluated(model, batches()[0])
        frozen = model.to_quantized()
        assert torch.equal(evaluated(frozen, batches()[0]), expected)
        frozen.save(tmp_path)
        loaded = quantization.load(tmp_path, net)
        assert torch.equal(evaluated(loaded, batches()[0]), expected)


def test_the_output_of_a_recurrent_layer_may_be_packed() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([3, 2])
            packed = pack_padded_sequence(x, lengths, batch_first=True)
            return self.lstm(packed)[0].data  # type: ignore[no-any-return]

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    scheme = TensorScheme(format="int4")
    rule = Rule(op_types=["LSTM"], options=[OpConfig(weight=scheme, output=scheme)])
    trainable = prepare_qat(Packed(), calib_dataloader=[x], rules=[rule])
    trainable(x).sum().backward()
    assert trainable.model.lstm.weight_ih_l0.grad is not None
    with torch.no_grad():
        values = trainable.eval()(x)
    assert len(values.unique()) <= 16
    assert torch.equal(trainable.to_quantized()(x), values)
