"""Where function calls are watched, by whom, and what stays after a forward."""

import gc
import inspect
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import Functional, inputs_for, seeded
from tuner import quantization
from tuner.config import Rule
from tuner.model import InstrumentedModel
from tuner.qparams import QParams
from tuner.quantizer import Quantizer
from tuner.schemes import OpConfig, TensorScheme

STEP = 2.0**-3
INT8 = TensorScheme(format="int8")


class OneStep:
    """Every activation has the same step."""

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        return QParams(STEP)


def rounded(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, STEP, 0, -128, 127)


def depth() -> int:
    return int(torch._C._len_torch_function_stack())


class Inner(nn.Module):
    """x @ xᵀ, and how many function modes were on."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(depth())
        return x @ x.mT


class Outer(nn.Module):
    """Three products, the second one in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.modes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(depth())
        first = x @ x
        second = self.inner(first)
        return second @ x


class Root(nn.Module):
    """Calls a module twice, with a product of its own between."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer()
        self.modes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(depth())
        return self.outer(x) @ x


EXPECTED = {
    "/matmul:0": lambda x: rounded((x @ x) @ (x @ x).mT @ x) @ rounded(x),
    "outer/matmul:0": lambda x: _after_first(rounded(x) @ rounded(x), x),
    "outer/matmul:1": lambda x: rounded((x @ x) @ (x @ x).mT) @ rounded(x) @ x,
    "outer.inner/matmul:0": lambda x: rounded(x @ x) @ rounded(x @ x).mT @ x @ x,
}


def _after_first(first: Tensor, x: Tensor) -> Tensor:
    return first @ first.mT @ x @ x


@pytest.mark.parametrize("name", EXPECTED)
def test_only_the_scope_of_a_site_is_watched(name: str) -> None:
    net = Root()
    x = torch.randn(4, 4)
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(x), 1).ops, OneStep())
    assert set(EXPECTED) == set(model.ops)
    model.apply({name: OpConfig(inputs=(INT8, INT8))})
    scopes = {"": net, "outer": net.outer, "outer.inner": net.outer.inner}
    for module in scopes.values():
        module.modes.clear()
    with torch.no_grad():
        assert torch.equal(net(x), EXPECTED[name](x))
    owner = name.rpartition("/")[0]
    for path, module in scopes.items():
        assert module.modes == [int(path.startswith(owner))], path


def test_all_at_once_are_each_quantized_once() -> None:
    net = Root()
    x = torch.randn(4, 4)
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(x), 1).ops, OneStep())
    model.apply({name: OpConfig(inputs=(INT8, INT8)) for name in model.ops})
    with torch.no_grad():
        for _ in range(2):
            first = rounded(rounded(x) @ rounded(x))
            second = rounded(first @ first.mT) @ rounded(x)
            assert torch.equal(net(x), rounded(second) @ rounded(x))
    assert {name: site.calls for name, site in model.runtime.sites.items()} == dict.fromkeys(
        EXPECTED, 2
    )


class Product(nn.Module):
    """x @ x."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x


def test_a_scope_within_others_compiles_as_one_graph() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Product()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.sin()) + x

    x = torch.randn(4, 4)
    sim = quantization.simulate(Nested(), INT8, calib_dataloader=[x])
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(sim, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), sim(x))


class Fails(nn.Module):
    """A product, and an error where it is asked for."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        y = x @ x
        if self.fails:
            raise RuntimeError("asked for")
        return y


def test_an_error_inside_leaves_nothing_on() -> None:
    net = Fails()
    x = torch.randn(4, 4)
    model = InstrumentedModel(net)
    model.install(model.record(lambda: net(x), 1).ops, OneStep())
    model.apply({"/matmul:0": OpConfig(inputs=(INT8, INT8))})
    net.fails = True
    with pytest.raises(RuntimeError, match="asked for"):
        net(x)
    assert depth() == 0
    net.fails = False
    assert torch.equal(net(x), rounded(x) @ rounded(x))


def simulated() -> nn.Module:
    net = seeded(Functional)
    rule = Rule(op_types=["add", "mul"], options=[OpConfig(inputs=INT8)])
    return quantization.simulate(net, INT8, INT8, calib_dataloader=[inputs_for(net)], rules=[rule])


def test_threads_do_not_meet() -> None:
    net = simulated()
    data = [inputs_for(net) * scale for scale in (0.5, 1.0, 1.5, 2.0)]
    with torch.no_grad():
        expected = [net(x) for x in data]
    wrong: list[int] = []
    start = threading.Barrier(len(data))

    def work(index: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(40):
                if not torch.equal(net(data[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_holds_an_activation_after_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    net = simulated()
    seen: list[weakref.ref[Tensor]] = []
    call = Quantizer.__call__

    def watched(self: Quantizer, x: Tensor) -> Tensor:
        y = call(self, x)
        seen.extend((weakref.ref(x), weakref.ref(y)))
        return y

    monkeypatch.setattr(Quantizer, "__call__", watched)
    with torch.no_grad():
        output: Any = net(inputs_for(net))
    del output
    gc.collect()
    assert len(seen) > 8
    assert not [x for reference in seen if (x := reference()) is not None]


def test_a_watched_model_shows_the_parameters_of_its_own_forward() -> None:
    """Batches are passed by them: of (x, y) a model gets as many as it requires."""

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
            return x @ y * scale

    model = Two()
    expected = inspect.signature(model.forward)
    batch = torch.eye(2), torch.eye(2)
    simulated = quantization.simulate(model, inputs=INT8, calib_dataloader=[batch])
    assert type(simulated) is not Two
    assert inspect.signature(simulated.forward) == expected
