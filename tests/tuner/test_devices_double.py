"""What is computed on a device that is not the CPU equals what the CPU computes.

A double stands in for a GPU where there is none: it shows tensors on the wrong device, and steps
that only the native kernels of the CPU go around; not the kernels of a GPU (tests/tuner/test_cuda).
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.device_double import DEVICE, DeviceTensor, device_double
from tests.tuner.nets import (
    Branching,
    ConvNet,
    Encoder,
    Functional,
    Recurrent,
    Transposed,
    inputs_for,
    main_output,
    seeded,
)
from tests.tuner.recovery.chain_nets import Net
from tests.tuner.training.tasks import CONFIG, prepared, step
from tuner import (
    AccuracyGoal,
    OpConfig,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Plan,
    QuantizedModel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    calibrate,
    compute_qparams,
    dequantize,
    fake_quantize,
    formats,
    quantization,
    quantize,
)
from tuner.calibrators import CALIBRATORS
from tuner.granularity import Granularity
from tuner.recovery.lsq import LearnedStep, learned_fake_quantize
from tuner.repairs import SUPPORTED, name_of
from tuner.trainable_model import parameter_groups

NETS = (ConvNet, Functional, Encoder, Recurrent, Branching, Transposed)
GRANULARITIES: tuple[Granularity, ...] = (PerTensor(), PerChannel(0), PerGroup(32), PerToken())
FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with device_double():
        yield


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


def here(x: Tensor) -> Tensor:
    """Return the values of a tensor that must be on the device."""
    assert isinstance(x, DeviceTensor)
    return x.inner.detach()


class TestDouble:
    """It refuses what an accelerator would, and only that."""

    def test_tensors_of_two_devices_do_not_mix(self) -> None:
        x, y = values(3, 4).to(DEVICE), values(3, 4)
        refused: list[Any] = [
            lambda: x + y,
            lambda: F.linear(x, y),
            lambda: torch.cat([x, y]),
            lambda: torch.where(x > 0, x, y),
            lambda: x.index_select(0, torch.tensor([1])),
            lambda: y.add_(x),
            lambda: y[0, 0].add_(x[0, 0]),
            lambda: y[0].copy_(y[0] * x[0]),
            lambda: x.clamp(torch.tensor(0.0)),
            lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        ]
        for call in refused:
            with pytest.raises(RuntimeError, match=r"same device|generator"):
                call()
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()

    def test_the_rest_is_computed(self) -> None:
        y = values(3, 4)
        x = y.to(DEVICE).requires_grad_()
        assert not x.is_cpu
        assert torch.equal(here(x * torch.tensor(2.0)), y * 2)
        assert torch.equal(here(x[torch.tensor([1])]), y[[1]])
        assert torch.equal(torch.zeros(3, 4).copy_(x.detach()), y)
        x.square().sum().backward()
        assert x.grad is not None
        assert torch.equal(here(x.grad), 2 * y)
        assert x.tolist() == y.tolist()
        assert torch.equal(here(torch.tensor([1.0, 2.0], device=DEVICE)), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name", formats.names())
def test_formats(name: str) -> None:
    x, scheme = values(6, 96), TensorScheme(format=name)
    expected, there = fake_quantize(x, scheme), x.to(DEVICE)
    assert torch.equal(here(fake_quantize(there, scheme)), expected)
    for qparams in (compute_qparams(x, scheme), compute_qparams(there, scheme)):
        codes = quantize(there, scheme, qparams)
        assert torch.equal(here(codes), quantize(x, scheme, compute_qparams(x, scheme)))
        assert torch.equal(here(dequantize(codes, scheme, qparams)), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES[:3], ids=repr)
@pytest.mark.parametrize("method", CALIBRATORS)
def test_calibration(method: Any, granularity: Granularity) -> None:
    scheme = TensorScheme(
        format="int8", calibration=method, granularity=granularity, symmetric=False
    )
    data = [values(8, 64), values(8, 64) * 2]
    found, expected = calibrate([x.to(DEVICE) for x in data], scheme), calibrate(data, scheme)
    pairs = (found.scale, expected.scale), (found.zero_point, expected.zero_point)
    for one, other in pairs:
        assert one is not None
        assert other is not None
        assert torch.equal(here(torch.as_tensor(one)), torch.as_tensor(other))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("name", ["int4", "e4m3fn", "mxfp4", "nvfp4", "nf4"])
def test_what_is_rounded_may_be_changed_in_place(name: str, granularity: Granularity) -> None:
    """As `F.relu_` behind a layer whose output is quantized does."""
    scheme = TensorScheme(format=name, granularity=granularity)
    for device in (DEVICE, "cpu"):
        x = values(6, 64).to(device).requires_grad_()
        y = fake_quantize(x * 1, scheme)
        expected = y.detach().clone().relu()
        assert torch.equal(F.relu_(y), expected)
        if name == "int4":
            scale = torch.as_tensor(compute_qparams(x.detach(), scheme).scale)
            learned = learned_fake_quantize(x * 1, scale, None, LearnedStep(scheme, 1.0))
            F.relu_(learned).sum().backward()


def both(net: nn.Module) -> list[nn.Module]:
    """Return a network on the device, and the same on the CPU."""
    return [copy.deepcopy(net).to(DEVICE), net]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # Branching
@pytest.mark.parametrize("net_type", NETS, ids=lambda t: t.__name__)
def test_simulated(net_type: type[nn.Module]) -> None:
    x, outputs = inputs_for(seeded(net_type)), []
    for net in both(seeded(net_type)):
        for data in (x, x.to(DEVICE)):  # batches go where the model is
            found = quantization.simulate(net, "int8", "int4", "int8", [data])
            outputs.append(main_output(found(x.to(next(net.parameters()).device))))
        assert repr(found)
    for output in outputs[:2]:
        torch.testing.assert_close(here(output), outputs[-1].detach(), **FP32)


@pytest.mark.parametrize(
    ("net_type", "method"),
    [
        (ConvNet, "qat"),
        (ConvNet, "lsq"),
        (Encoder, "lsq+"),
        (Recurrent, "lsq"),
        (Functional, "qat"),
    ],
    ids=str,
)
def test_trained(net_type: type[nn.Module], method: str, tmp_path: Path) -> None:
    """Losses are those of the CPU; checkpoints and saved models go from one to the other."""
    x, models, losses = inputs_for(seeded(net_type)), [], []
    for net in both(seeded(net_type)):
        batch = x.to(next(net.parameters()).device)
        model = prepared(net, [batch], method=method, outputs="int8", quant_start_step=1)
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
        losses.append([step(model, optimizer, batch) for _ in range(3)])
        models.append(model.eval())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    there, cpu = models
    cpu.load_state_dict({name: value.cpu() for name, value in there.state_dict().items()})
    expected = main_output(cpu(x)).detach()
    torch.testing.assert_close(here(main_output(there(x.to(DEVICE)))), expected, **FP32)
    assert [r.to_dict() for r in there.learned_ranges()] == [
        r.to_dict() for r in cpu.learned_ranges()
    ]
    there.to_quantized().save(tmp_path)
    loaded = quantization.load(tmp_path, seeded(net_type))
    torch.testing.assert_close(main_output(loaded(x)).detach(), expected, **FP32)


def fit_on(net: nn.Module, x: Tensor, space: Any, **options: Any) -> QuantizedModel:
    """Search on the device of a network, its own float outputs being the goal."""
    x = x.to(next(net.parameters()).device)
    with torch.no_grad():
        target = main_output(net(x))

    @torch.no_grad()
    def eval_func(model: nn.Module) -> Tensor:
        return 1 - (main_output(model(x)) - target).abs().mean() / target.abs().mean()

    config = TuningConfig(space=space, max_trials=3, goal=AccuracyGoal(max_drop=9.0))
    return quantization.fit(net, [x, x], eval_func, config, progress=False, **options)


def same_on_both(net: nn.Module, x: Tensor, space: Any, path: Path, **options: Any) -> Plan:
    """Fit on both devices; return the plan, after the saved model was loaded on each."""
    blank = copy.deepcopy(net)
    there, cpu = (fit_on(n, x, space, **options) for n in both(net))
    assert there.result.best.accuracy == pytest.approx(cpu.result.best.accuracy, abs=1e-3)
    assert there.plan == cpu.plan
    there.save(path)
    expected = here(main_output(there(x.to(DEVICE))))
    for target in both(blank):
        batch = x.to(next(target.parameters()).device)
        output = main_output(quantization.load(path, target)(batch))
        torch.testing.assert_close(output.detach().cpu(), expected, **FP32)
    return there.plan


@pytest.mark.parametrize(
    ("net_type", "space"), [(ConvNet, "mixed-int"), (Encoder, "fp8"), (Recurrent, "int8-dynamic")]
)
def test_fit(net_type: type[nn.Module], space: str, tmp_path: Path) -> None:
    same_on_both(seeded(net_type), inputs_for(seeded(net_type)), space, tmp_path)


def shifted_chain() -> nn.Module:
    """Norm, linear, ReLU, linear: channels far from 0, so that every repair has work to do."""
    torch.manual_seed(0)
    net: Any = Net(
        lambda net, x: net.c(net.b(net.a(x)).relu()),
        a=nn.LayerNorm(16),
        b=nn.Linear(16, 32),
        c=nn.Linear(32, 24),
    )
    with torch.no_grad():
        net.b.bias[:8] += torch.linspace(20, 60, 8)
        net.c.bias -= net.c.weight @ net.b.bias.relu()
    return net.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("repair", SUPPORTED)
def test_repairs(repair: str, tmp_path: Path) -> None:
    weight = TensorScheme(format="int4", granularity=PerChannel(0))
    inputs = None if repair == "awq" else TensorScheme(format="int8", symmetric=False)
    options = [OpConfig(weight=weight, inputs=inputs, recovery=(repair,))]
    net, name = (seeded(ConvNet), "conv") if repair == "bn_reestimation" else (shifted_chain(), "c")
    x = inputs_for(net) if name == "conv" else values(32, 16)
    space = SearchSpace(preset="int8", rules=[Rule(names=[name], options=options)])
    plan = same_on_both(net, x, space, tmp_path)
    assert [name_of(done) for done in plan[name].recovery] == [repair]


@pytest.mark.parametrize("repair", ["qat", "lsq"])
def test_plans_are_trained(repair: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"recovery": (repair,)})
    rule = Rule(op_types=["Conv2d", "Linear"], options=[config])
    net = seeded(ConvNet)
    x = inputs_for(net, 16)
    data = [(x, torch.arange(16) % 5)]  # on the CPU: batches and labels go where the model is
    space = SearchSpace(preset="int8", rules=[rule])
    plan = same_on_both(net, x, space, tmp_path, train_func=(data, F.cross_entropy))
    assert plan["conv"].recovery == (repair,)
