"""The state of a trainable model: its names, groups, copies, ranges, and lower precision."""

import copy
import io
import json
import math
import pickle

import pytest
import torch

from tests.tuner.nets import Attention, Recurrent, inputs_for, main_output, seeded
from tests.tuner.training.tasks import (
    INPUTS,
    METHODS,
    Perceptron,
    batches,
    evaluated,
    prepared,
    same_state,
    step,
    train,
)
from tuner.errors import TunerError
from tuner.trainable_model import TrainableModel, parameter_groups

FP32 = {"rtol": 1e-5, "atol": 1e-6}


class TestState:
    def test_names_are_the_users_and_the_quantizers(self) -> None:
        net = Perceptron()
        model = prepared(net, batches(), method="lsq")
        state = model.state_dict()
        assert {f"model.{name}" for name in net.state_dict()} < state.keys()
        assert "quantizers.weight:first/weight.scale" in state
        assert "quantizers.second:input0.zero_point" in state
        assert int(state["steps"]) == 0

    def test_groups_hold_every_parameter_once(self) -> None:
        model = prepared(seeded(Attention), [inputs_for(seeded(Attention))], method="lsq+")
        groups = parameter_groups(model, 1e-3, scale_lr=1e-5, weight_decay=0.1)
        held = [id(p) for group in groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
        (scales,) = (group for group in groups if group["lr"] == 1e-5)
        assert {id(p) for p in scales["params"]} == {id(p) for p in model.scales().values()}
        assert scales["weight_decay"] == 0
        assert all(p.ndim > 1 for group in groups if group["weight_decay"] for p in group["params"])

    def test_copies_train_on_their_own(self) -> None:
        model = prepared(Perceptron(), batches(), method="lsq")
        other, third = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for twin in (other, third):
            assert same_state(model, twin)
            train(twin, batches(2))
            assert int(twin.steps) == 2
            assert not same_state(model, twin)
        assert same_state(other, third)
        assert int(model.steps) == 0

    @pytest.mark.parametrize("calibrated", [True, False])
    @pytest.mark.parametrize("taken", [0, 1, 2, 3])
    @pytest.mark.parametrize("method", METHODS)
    def test_a_checkpoint_may_be_taken_at_any_step(
        self, method: str, taken: int, calibrated: bool
    ) -> None:
        """Before the first batch, in the warm-up of two steps, at its end and after it."""
        net, data, calib = Perceptron(), batches(5), batches(1) if calibrated else None
        straight, first, resumed = (
            prepared(net, calib, method=method, quant_start_step=2) for _ in range(3)
        )
        optimizer = torch.optim.Adam(parameter_groups(straight, 1e-2))
        expected = [step(straight, optimizer, batch) for batch in data][taken:]
        optimizer = train(first, data[:taken])
        file = io.BytesIO()
        torch.save((first.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        state, of_optimizer = torch.load(file, weights_only=True)
        resumed.load_state_dict(state)
        assert resumed.is_quantizing == (taken >= 2)
        assert resumed.is_ready == (calibrated or taken > 0)
        optimizer = torch.optim.Adam(parameter_groups(resumed, 1e-2))
        optimizer.load_state_dict(of_optimizer)
        assert [step(resumed, optimizer, batch) for batch in data[taken:]] == expected
        assert same_state(straight, resumed)

    def test_ranges_are_what_the_model_rounds_with(self) -> None:
        model = prepared(Perceptron(), batches(), method="lsq+")
        train(model, batches())
        found = {(r.name, r.operand): r for r in model.learned_ranges()}
        activation, weight = found["second", "input 0"], found["second.weight", "weight"]
        frozen = model.to_quantized()._parts.model
        expected = frozen.qparams("second", 0, INPUTS)
        assert expected is not None
        assert torch.equal(activation.scale, torch.as_tensor(expected.scale))
        assert int(activation.zero_point) == int(expected.zero_point)  # type: ignore[arg-type]
        zero = float(activation.zero_point)
        assert float(activation.min) == pytest.approx((-128 - zero) * float(activation.scale))
        assert float(activation.max) == pytest.approx((127 - zero) * float(activation.scale))
        assert weight.scale.shape == (3,)
        torch.testing.assert_close(weight.max, 7 * weight.scale)
        plain = json.loads(json.dumps([r.to_dict() for r in found.values()], allow_nan=False))
        assert plain[0]["min"] == pytest.approx(float(found["first", "input 0"].min))
        rounded = dict(frozen.model.named_parameters())["second.weight"]
        codes = rounded / weight.scale.unsqueeze(1)
        torch.testing.assert_close(codes, codes.round(), **FP32)

    def test_learned_scales_move_and_stay_positive(self) -> None:
        model = prepared(Perceptron(), batches(), method="lsq")
        groups = parameter_groups(model, 0.0, scale_lr=0.5)
        optimizer = torch.optim.SGD(groups)
        for batch in batches(6):
            step(model, optimizer, batch)
        assert all(float(r.scale.min()) > 0 for r in model.learned_ranges())
        assert math.isfinite(float(evaluated(model, batches()[0]).sum()))

    def test_bf16_autocast_trains(self) -> None:
        for method in METHODS:
            model = prepared(seeded(Attention), [inputs_for(seeded(Attention))], method=method)
            optimizer = torch.optim.SGD(parameter_groups(model, 0.1))
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(inputs_for(model.model)).float().square().mean()
            loss.backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
            assert all(torch.isfinite(p.grad).all() for p in trained if p.grad is not None)
            optimizer.step()
            assert int(model.steps) == 1

    def test_a_bf16_model_trains_and_becomes_the_same(self) -> None:
        for method in METHODS:
            net, data = Perceptron().bfloat16(), [b.bfloat16() for b in batches()]
            model = prepared(net, data, method=method)
            train(model, data)
            expected = evaluated(model, data[0])
            assert torch.equal(evaluated(model.to_quantized(), data[0]), expected)

    def test_ranges_must_be_known_before_it_is_frozen(self) -> None:
        model = prepared(Perceptron(), None)
        assert not model.is_ready
        with pytest.raises(TunerError, match="training mode first"):
            model.to_quantized()
        model(batches()[0])
        assert model.is_ready
        assert isinstance(model, TrainableModel)
        model.to_quantized()

    def test_recurrent_weights_get_gradients_through_their_rounding(self) -> None:
        net = seeded(Recurrent)
        tokens = inputs_for(net)
        model = prepared(net, [tokens], method="lsq")
        main_output(model(tokens)).sum().backward()
        scales = {n: p for n, p in model.scales().items() if "lstm" in n and "weight" in n}
        assert len(scales) == 8
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in scales.values())
