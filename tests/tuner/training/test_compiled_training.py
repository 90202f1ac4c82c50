"""What torch.compile makes of a training step: the same gradients, compiled once."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from tests.tuner.nets import Attention, ConvNet, Tied, inputs_for, main_output, seeded
from tests.tuner.training.tasks import METHODS, Perceptron, batches, prepared
from tuner.kernels import codecs
from tuner.trainable_model import TrainableModel, parameter_groups

FP32 = {"rtol": 1e-4, "atol": 1e-5}


class Calls(nn.Module):
    """Functional calls, of parameters and of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 16) / 4)
        self.k = nn.Parameter(torch.randn(16, 12) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.w) @ self.k.t()
        return y @ x.transpose(1, 2)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(
    model: TrainableModel, run: nn.Module, batch: torch.Tensor
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    main_output(run(batch)).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's, at a graph break
@pytest.mark.parametrize(
    ("net_type", "method"),
    [(ConvNet, "qat"), (Tied, "lsq+"), (Attention, "lsq"), (Calls, "lsq")],
    ids=str,
)
def test_gradients_are_those_of_the_eager_model(net_type: type[nn.Module], method: str) -> None:
    net = seeded(net_type)
    batch = inputs_for(net)
    eager = prepared(net, [batch], method=method)
    compiled = prepared(net, [batch], method=method)
    run = torch.compile(compiled, backend="aot_eager")
    for _ in range(2):
        expected = gradients(eager, eager, batch)
        found = gradients(compiled, run, batch)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, **FP32, msg=name)
    states = eager.state_dict(), compiled.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in dynamo
@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_modules_is_one_graph_and_is_compiled_once(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "_KNOWN", {})  # as in a new process: what is known is guarded
    model = prepared(Perceptron(), batches(), method=method, quant_start_step=1)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.01))
    counts = []
    for batch in batches(5):
        run(batch).square().mean().backward()
        optimizer.step()
        counts.append(counter.frame_count)
    assert int(model.steps) == 5
    assert counts == [1, 2, 2, 2, 2]  # once for the warm-up, once after it


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in dynamo
@pytest.mark.parametrize("method", METHODS)
def test_the_first_batch_may_set_the_ranges(method: str) -> None:
    eager, compiled = (prepared(Perceptron(), None, method=method) for _ in range(2))
    compiled.model.load_state_dict(eager.model.state_dict())
    compiled.quantizers.load_state_dict(eager.quantizers.state_dict())
    run = torch.compile(compiled, backend="aot_eager")
    for batch in batches(3):
        torch.testing.assert_close(run(batch), eager(batch), **FP32)
    assert compiled.is_ready


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in dynamo
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in inductor
def test_inductor_trains_as_eager() -> None:
    """The default backend, two batches a step, a warm-up of one step."""
    losses, states = [], []
    for compiles in (True, False):
        torch.manual_seed(0)
        model = prepared(Perceptron(), batches(), method="lsq+", quant_start_step=1)
        run = torch.compile(model, fullgraph=True) if compiles else model
        optimizer = torch.optim.SGD(parameter_groups(model, 0.3, scale_lr=0.3))
        for i, batch in enumerate(batches(8)):
            loss = run(batch).square().mean() / 2
            loss.backward()
            losses.append(float(loss.detach()))
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert int(model.steps) == 4
        states.append(model.state_dict())
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, **FP32, msg=name)
    assert losses[:8] == pytest.approx(losses[8:], rel=1e-4)
