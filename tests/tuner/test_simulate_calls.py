"""simulate(): calls that come late, packed, compiled or of another size, and training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tuner import OpConfig, PerChannel, Rule, TensorScheme, quantization
from tuner.errors import SchemeError, SpaceError
from tuner.model import InstrumentedModel

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
FAR = torch.full((2, 8), 9.0)
A8 = TensorScheme(format="uint8", symmetric=False)
D8 = TensorScheme(format="int8", dynamic=True)
LAST = TensorScheme(format="int8", granularity=PerChannel(-1))

# ---------------------------------------------------------------- rules and late batches


class Fork(nn.Module):
    """Large inputs take a branch that small ones never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.far(x @ x.t() @ x) if x[0, 0] > 5 else self.near(x)


@pytest.mark.parametrize(
    ("fields", "reached"),
    [
        ({"names": ["far"]}, {"far"}),
        ({"names": ["near", "far"]}, {"near", "far"}),
        ({"op_types": ["matmul"]}, {"matmul:0", "matmul:1"}),
        ({"names": ["/matmul:1"]}, {"matmul:1"}),
        ({"op_types": ["Linear", "matmul"], "names": ["far"]}, {"far"}),
    ],
)
def test_rules_may_speak_of_what_later_batches_reach(
    fields: dict[str, Any], reached: set[str]
) -> None:
    rule = Rule(options=[OpConfig(inputs=A8)], **fields)
    sim = quantization.simulate(Fork(), rules=[rule], calib_dataloader=[3 * X, FAR, X])
    words = {name: f"{name}:" for name in ("matmul:0", "matmul:1")}
    assert {name for name, word in words.items() if word in str(sim)} == reached & words.keys()
    modules = {name for name in ("near", "far") if "uint8" in str(sim.get_submodule(name))}
    assert modules == reached - words.keys()
    if "near" in reached:  # its range holds the first batch, too
        span = float(3 * X.max() - 3 * X.min()) / 255
        assert f"scale {span:.4g}" in str(sim.near)


@pytest.mark.parametrize("fields", [{"names": ["fra"]}, {"op_types": ["matmull"]}])
def test_typos_are_found_on_the_first_batch(fields: dict[str, Any]) -> None:
    read: list[Tensor] = []

    def batches() -> Any:
        for batch in (X, X):
            read.append(batch)
            yield batch

    rule = Rule(options=[OpConfig(inputs=A8)], **fields)
    with pytest.raises(SpaceError, match="unknown op"):
        quantization.simulate(Fork(), rules=[rule], calib_dataloader=batches())
    assert len(read) == 1


def test_a_rule_for_what_no_batch_reached_is_refused_in_the_end() -> None:
    rule = Rule(names=["far"], options=[OpConfig(inputs=A8)])
    with pytest.raises(SpaceError, match="unknown op name in a rule 'far'"):
        quantization.simulate(Fork(), "int4", rules=[rule], calib_dataloader=[X, X])


# ---------------------------------------------------------------- operands and outputs


class Recurrent(nn.Module):
    """A layer on a packed sequence; what it returns is packed, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> PackedSequence:
        packed = pack_padded_sequence(x, [5, 3], batch_first=True)
        return self.layer(packed)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer_type", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("scheme", [D8, D8.model_copy(update={"dynamic": False})])
def test_packed_outputs_are_rounded_as_torch_does(layer_type: Any, scheme: TensorScheme) -> None:
    net = Recurrent(layer_type(8, 6, batch_first=True))
    x = torch.randn(2, 5, 8)
    data = None if scheme.dynamic else [x]
    sim = quantization.simulate(net, outputs=scheme, calib_dataloader=data)
    with torch.no_grad():
        got, y = sim(x), net(x).data
        expected = torch.fake_quantize_per_tensor_affine(
            y, float(y.abs().max() / 127), 0, -128, 127
        )
    assert torch.allclose(got.data, expected, atol=1e-6)
    assert torch.equal(got.batch_sizes, net(x).batch_sizes)


@pytest.mark.parametrize(
    ("schemes", "says"),
    [({"inputs": LAST}, r"^0, input 0: .*\[9\]"), ({"outputs": LAST}, r"^0, output: .*\[7\]")],
)
def test_another_size_at_run_time_is_said_with_the_op(schemes: Any, says: str) -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3))
    sim = quantization.simulate(net, **schemes, calib_dataloader=[torch.randn(2, 3, 9)])
    with pytest.raises(SchemeError, match=says):
        sim(torch.randn(2, 3, 10))


# ---------------------------------------------------------------- compiled and trained


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def test_compiled_code_is_compiled_once() -> None:
    sim = quantization.simulate(mlp(), A8, "e3m4", A8, [X])
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(sim, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(X), sim(X))
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_calls_are_seen() -> None:
    model = InstrumentedModel(mlp())
    model.install(model.record(lambda: model.model(X), 1).ops, None)  # type: ignore[arg-type]
    model.apply({name: OpConfig(inputs=D8) for name in model.ops})
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model.model, backend="eager")(X)
    assert [site.calls for site in model.runtime.sites.values()] == [1, 1]


class ByHand(torch.autograd.Function):
    """Affine fake quantization in float64, straight through inside its range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, levels: int) -> Tensor:
        scale = (high - low) / levels
        zero = round(-low / scale)
        codes = (x / scale).round() + zero
        steps = x / scale + zero
        ctx.save_for_backward((steps >= -1e-4) & (steps <= levels + 1e-4))
        return (codes.clamp(0, levels) - zero) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.saved_tensors[0], None, None, None


@pytest.mark.parametrize("bits", [8, 3])
def test_training_has_the_gradients_of_a_computation_by_hand(bits: int) -> None:
    scheme = TensorScheme(format=f"uint{bits}", symmetric=False)
    net = mlp().double()
    data, x, again = X[:8].double(), X.double().requires_grad_(), X.double().requires_grad_()
    with torch.no_grad():
        hidden = net[0](data)
        seen = [data, hidden, F.relu(hidden), net(data)]
    ranges = [(min(float(t.min()), 0.0), max(float(t.max()), 0.0)) for t in seen]
    sim = quantization.simulate(net, scheme, None, scheme, [data]).train()

    def rounded(values: Tensor, which: int) -> Tensor:
        return ByHand.apply(values, *ranges[which], 2**bits - 1)  # type: ignore[no-any-return]

    expected = rounded(net[0](rounded(again, 0)), 1)
    expected = rounded(net[2](rounded(F.relu(expected), 2)), 3)
    got = sim(x)
    for output in (got, expected):
        output.square().sum().backward()
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(x.grad, again.grad, atol=1e-5)  # type: ignore[arg-type]
    for ours, theirs in zip(sim.parameters(), net.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["plain", "causal", "mask", "gqa"])
def test_attention_equals_a_computation_in_float64(how: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 5)
    mask = torch.rand(7, 9) > 0.3
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": mask, "scale": 0.3},
        "gqa": {"enable_gqa": True},
    }
    if how == "gqa":
        k, v = k[:, :2], v[:, :2]

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options[how])

    def int8(x: Tensor) -> Tensor:
        scale = float((x.abs().max() / 127).float())
        return (x / scale).round().clamp(-128, 127) * scale

    def shares(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * options[how].get("scale", 8**-0.5)
        hidden = {"causal": torch.ones(7, 9).triu(1).bool(), "mask": ~mask}.get(how)
        return torch.softmax(
            scores if hidden is None else scores.masked_fill(hidden, -torch.inf), -1
        )

    exact = [t.double() for t in (q, k, v)]
    if how == "gqa":
        exact = [exact[0], *(t.repeat_interleave(2, 1) for t in exact[1:])]
    largest = shares(*exact[:2]).max() / 127  # the range comes from the float model
    query, key, value = map(int8, exact)
    steps = float(largest.float())
    rounded = (shares(query, key) / steps).round().clamp(-128, 127) * steps
    sim = quantization.simulate(Attend(), "int8", calib_dataloader=[(q, k, v)])
    assert torch.allclose(sim(q, k, v).double(), rounded @ value, atol=1e-5)
