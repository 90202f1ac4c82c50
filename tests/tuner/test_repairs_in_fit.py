"""Repairs in fit(): what is asked for is done, the model's function stays, studies resume."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.channels import site_qparams
from tests.tuner.recovery.chain_nets import Net, spread
from tuner import (
    AccuracyGoal,
    NothingQuantizedWarning,
    OpConfig,
    PerChannel,
    Plan,
    QuantizedModel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import SpaceError, TunerError, UnsupportedError
from tuner.repairs import PROPOSED, SCALINGS, Repair, name_of

W4 = TensorScheme(format="int4", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
_FP32 = 1e-5  # of the largest output
_MORE_CALLS = 3  # of the model: its outputs before and after scaling, and gradients


def mlp(**others: nn.Module) -> Any:
    """Three linear layers with relu and relu6 between, whose channels differ in size."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(16, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 5)}
    net = Net(
        lambda net, x: net.c(net.act(net.b(net.a(x).relu()))), act=nn.ReLU6(), **layers, **others
    )
    spread(net, largest=100.0)
    net.b.weight.data /= 30
    net.c.weight.data /= net.c.weight.abs().amax()
    return net


def rule(*recovery: Any, names: str = "b", **fields: Any) -> Rule:
    option = OpConfig(weight=W4, inputs=(A8,), recovery=recovery, **fields)
    return Rule(names=[names], options=[option])


def fit(
    net: nn.Module,
    *rules: Rule,
    repairs: tuple[str, ...] = PROPOSED,
    preset: str = "mixed-int",
    data: Any = None,
    eval_func: Callable[[Any], Any] | None = None,
    max_trials: int = 50,
    goal: AccuracyGoal | None = None,
    **options: Any,
) -> QuantizedModel:
    space = SearchSpace(preset=preset, rules=rules, repairs=repairs)
    config = TuningConfig(space=space, max_trials=max_trials, goal=goal or AccuracyGoal())
    loader = [X] if data is None else data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingQuantizedWarning)
        return quantization.fit(net, loader, eval_func, config, **options)


def agreement(expected: Tensor) -> Callable[[Any], float]:
    """Return a score: minus the relative error of the outputs."""

    def score(model: Any) -> float:
        with torch.no_grad():
            return 1 - float((model(X) - expected).norm() / expected.norm())

    return score


def without_plan(model: QuantizedModel) -> Any:
    model._parts.model.apply({})
    return model.model


def test_repairs_keep_the_function_and_can_be_switched_off() -> None:
    net = mlp()
    repaired, plain = fit(net, preset="int8"), fit(net, preset="int8", repairs=())
    assert {name_of(r) for config in repaired.plan.values() for r in config.recovery}
    assert [s.chain.caps for s in repaired._parts.scalings] == [(), ("act",)]
    assert not any(config.recovery for config in plain.plan.values())
    assert plain._parts.scalings == ()
    with torch.no_grad():
        expected = net(X)
        difference = (without_plan(repaired)(X) - expected).abs().max() / expected.abs().max()
        assert float(difference) < _FP32
        assert torch.equal(without_plan(plain)(X), expected)


@pytest.mark.parametrize(
    "recovery",
    [
        ("equalization",),
        (Repair(name="smoothquant", alpha=0.3),),
        (Repair(name="awq", alpha=0.7),),
        ("equalization", "gptq", "bias_correction"),
        ("adaround",),
        ("bias_correction",),
        (),
    ],
    ids=str,
)
@pytest.mark.parametrize("repairs", [(), PROPOSED])
def test_a_rule_gets_exactly_what_it_asks_for(recovery: Any, repairs: tuple[str, ...]) -> None:
    model = fit(mlp(), rule(*recovery), repairs=repairs)
    assert model.plan["b"].recovery == recovery
    scaled = [s.repair for s in model._parts.scalings if "b" in s.chain.consumers]
    assert scaled == [r for r in recovery if name_of(r) in ("equalization", "smoothquant", "awq")]


def test_the_best_alpha_is_written_into_the_plan() -> None:
    (found,) = fit(mlp(), rule("smoothquant")).plan["b"].recovery
    assert isinstance(found, Repair)
    assert found.alpha is not None


@pytest.mark.parametrize("repairs", [("gptq",), ("bias_correction",), ("equalization", "awq")])
def test_presets_get_only_the_repairs_that_are_allowed(repairs: tuple[str, ...]) -> None:
    model = fit(mlp(), repairs=repairs, eval_func=agreement(mlp()(X).detach()))
    used = {
        name_of(r)
        for trial in model.result.trials
        for config in trial.plan.values()
        for r in config.recovery
    }
    assert used
    assert used <= set(repairs)


def test_a_plan_with_repairs_survives_json() -> None:
    plan = fit(mlp(), rule(Repair(name="smoothquant", alpha=0.3), "gptq", "bias_correction")).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again["b"].recovery == (Repair(name="smoothquant", alpha=0.3), "gptq", "bias_correction")


def _branching(net: Any, x: Tensor) -> Tensor:
    y = net.b(net.a(x).relu())
    return net.c(y) if float(x.sum()) > 0 else y[:, :5]  # type: ignore[no-any-return]


def _behind(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    seen = torch.tensor(y.tolist())  # no graph shows that
    return net.c(net.act(net.b(y))) + seen.sum(-1, keepdim=True)  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "no chain": (
        "a: equalization has nothing to work on",
        lambda: (mlp(), [rule("awq", names="a")]),
    ),
    "different repairs in a group": (
        "scaled for all options or for none",
        lambda: (siblings(), [rule("equalization"), rule("awq", names="c")]),
    ),
    "one of two options": (
        "scaled for all options or for none",
        lambda: (mlp(), [two_options()]),
    ),
    "nothing to equalize in a norm": (
        "b: equalization cannot scale the channels",
        lambda: (normed(), [rule("equalization")]),
    ),
    "branches": ("take different branches", lambda: (branching(), [rule("equalization")])),
    "a rounding of a tied weight": (
        "b: its weight cannot be rounded",
        lambda: (tied(), [rule("gptq"), rule("gptq", names="c")]),
    ),
    "a shared bias": ("shares its bias", lambda: (shared_bias(), [rule("bias_correction")])),
    "no bias": ("has no bias to correct", lambda: (no_bias(), [rule("bias_correction")])),
    "training": ("takes fit.train_func", lambda: (mlp(), [rule("qat")])),
    "learned steps": ("takes fit.train_func", lambda: (mlp(), [rule("lsq")])),
}
REFUSED["no chain"] = ("a: awq has nothing to work on", REFUSED["no chain"][1])


def siblings() -> Any:
    layers = {"a": nn.Linear(16, 8), "b": nn.Linear(8, 5), "c": nn.Linear(8, 5)}
    return Net(lambda net, x: (lambda y: net.b(y) + net.c(y))(net.a(x).relu()), **layers)


def normed() -> Any:
    return Net(lambda net, x: net.b(net.a(x)), a=nn.LayerNorm(16), b=nn.Linear(16, 5))


def branching() -> Any:
    net = mlp()
    net.run = _branching
    return net


def tied() -> Any:
    net = mlp()
    net.c = nn.Linear(32, 32)
    net.c.weight = net.b.weight
    return net


def shared_bias() -> Any:
    net = mlp()
    net.a.bias = net.b.bias
    return net


def no_bias() -> Any:
    net = mlp()
    net.b.bias = None
    return net


def two_options() -> Rule:
    options = [OpConfig(weight=W4, inputs=(A8,), recovery=recovery) for recovery in ((), ("awq",))]
    return Rule(names=["b"], options=options)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(name: str) -> None:
    message, make = REFUSED[name]
    net, rules = make()
    data = [X.abs() * -1, X.abs()] if name == "branches" else [X]
    with pytest.raises(TunerError, match=message) as caught:
        fit(net, *rules, data=data)
    assert isinstance(caught.value, SpaceError | UnsupportedError | TunerError)


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        (("equalisation",), "equalization"),
        (("awq", "equalization"), "exclude each other"),
        (("gptq", "adaround"), "exclude each other"),
        (({"name": "smoothquant", "alpha": 1.5},), "less than or equal to 1"),
        (({"name": "gptq", "alpha": 0.5},), "no parameter alpha"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(recovery: Any, message: str) -> None:
    with pytest.raises((ValueError, TunerError), match=message):
        OpConfig(weight=W4, recovery=recovery)


@pytest.mark.parametrize("repairs", [("qat",), ("nonsense",)])
def test_presets_have_only_repairs_without_training(repairs: Any) -> None:
    with pytest.raises((ValueError, TunerError), match="repair"):
        SearchSpace(repairs=repairs)


def test_simulate_and_sweep_refuse_repairs() -> None:
    config = OpConfig(weight=W4, recovery=("gptq",))
    with pytest.raises(UnsupportedError, match="recovery"):
        quantization.simulate(mlp(), rules=[Rule(names=["b"], options=[config])])
    with pytest.raises(UnsupportedError, match="recovery"):
        quantization.sweep(mlp(), [X], lambda model: 1.0, [("repaired", config)])


def test_a_chain_that_changes_the_function_is_left_alone() -> None:
    net = mlp()
    net.run = _behind
    model = fit(net, preset="int8")
    assert [s.chain.producer for s in model._parts.scalings] == ["b"]
    with pytest.raises(SpaceError, match="that changes the outputs of the model"):
        fit(net, rule("equalization"))


def test_where_nothing_is_quantized_fp32_comes_back_to_the_bit() -> None:
    net = mlp()
    expected = net(X).detach()
    model = fit(net, eval_func=lambda model: float(torch.equal(model(X), expected)), max_trials=4)
    assert model.result.quantized_ops == 0
    assert model._parts.scalings == ()
    assert torch.equal(model(X), expected)
    assert type(model.model.act) is nn.ReLU6
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
def test_the_users_model_is_untouched(fails: bool) -> None:
    net = mlp()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    calls = []

    def score(model: Any) -> float:
        calls.append(1)
        if fails and len(calls) > 1:
            raise RuntimeError("no")
        return agreement(net(X))(model)

    try:
        fit(net, eval_func=score, max_trials=6)
    except TunerError:
        assert fails
    assert len(calls) > 2
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert type(net.act) is nn.ReLU6
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())


def test_calibration_data_are_read_once_and_the_model_called_little_more() -> None:
    counts = []
    for repairs in ((), PROPOSED):
        net, calls = mlp(), []
        plain = net.run
        net.run = lambda self, x, plain=plain, calls=calls: (calls.append(1), plain(self, x))[1]
        model = fit(net, repairs=repairs, data=iter([X, X + 0.1, X - 0.1]))
        assert bool(model._parts.scalings) == bool(repairs)
        counts.append(len(calls))
    assert counts[1] - counts[0] <= _MORE_CALLS


def test_ranges_follow_the_scaled_channels() -> None:
    model = fit(mlp(), rule(Repair(name="smoothquant", alpha=0.9)))
    scale, _ = site_qparams(model.model, "b")
    bare = without_plan(model)
    with torch.no_grad():
        largest = bare.a(X).relu().max()
    torch.testing.assert_close(scale, largest / 255, rtol=_FP32, atol=0.0)


def test_a_layer_whose_output_is_quantized_is_not_scaled() -> None:
    option = OpConfig(weight=W4, inputs=(A8,), output=A8)
    model = fit(mlp(), Rule(names=["a"], options=[option]), preset="int8")
    assert [s.chain.producer for s in model._parts.scalings] == ["b"]


def test_a_shared_bias_is_never_corrected_by_a_preset() -> None:
    net = shared_bias()
    expected = net(X).detach()
    score, shifted = agreement(expected), [X + 3]  # a mean, whose error a bias can make up for
    model = fit(net, repairs=("bias_correction",), eval_func=score, max_trials=8, data=shifted)
    corrected = {n for t in model.result.trials for n, c in t.plan.items() if c.recovery}
    assert corrected <= {"c"}
    with torch.no_grad():
        assert torch.equal(without_plan(model)(X), expected)


def test_the_table_says_what_scaling_buys() -> None:
    model = fit(mlp(), preset="int8", repairs=("equalization", "smoothquant"))
    gains = {s.chain.consumers[0]: s.gain for s in model._parts.scalings}
    found = {row.name: row.repair_gain for row in model.result.op_table if row.repairs}
    assert found == pytest.approx(gains)


def _bent(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    y = y.relu() if float(x.sum()) < 0 else nn.functional.gelu(y)
    return net.c(net.act(net.b(y)))  # type: ignore[no-any-return]


def test_a_later_batch_on_another_way_leaves_the_channels_alone() -> None:
    net = mlp()
    net.run = _bent
    data = [-X.abs(), X.abs()]
    with torch.no_grad():
        expected = [net(x) for x in data]
    model = fit(net, data=data)
    names = {name_of(repair) for config in model.plan.values() for repair in config.recovery}
    assert not names & set(SCALINGS)
    model._parts.model.apply({})
    with torch.no_grad():
        for x, y in zip(data, expected, strict=True):
            assert torch.equal(model.model(x), y)
