"""Absorbed biases in fit(): asked for, proposed, kept, resumed, trained, and without a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tuner.channels import site_qparams
from tests.tuner.recovery.chain_nets import Net
from tests.tuner.test_repairs_in_fit import A8, W4, agreement, fit, rule, without_plan
from tuner import OpConfig, QuantizedModel, Rule, SearchSpace, quantization
from tuner.errors import SpaceError
from tuner.repairs import PROPOSED, REPAIRS, Repair, in_order, name_of

ABSORBED = "bias_absorption"
_ALLOWED = tuple(dict.fromkeys((*PROPOSED, ABSORBED)))
_FP32 = 1e-4  # of the largest output
_MEAN = 1e-5  # of the largest output
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def net() -> Any:
    """Norm a → linear b → relu → linear c → linear d: a and b have channels far from 0."""
    torch.manual_seed(0)
    layers = {"b": nn.Linear(16, 32), "c": nn.Linear(32, 24), "d": nn.Linear(24, 5)}
    made: Any = Net(
        lambda net, x: net.d(net.c(net.b(net.a(x)).relu())), a=nn.LayerNorm(16), **layers
    )
    made.a.bias.data[::3] = torch.linspace(-30, 40, 6)
    made.b.bias.data -= made.b.weight @ made.a.bias
    made.b.bias.data[:8] += torch.linspace(20, 60, 8)
    made.c.bias.data -= made.c.weight @ made.b.bias.relu()
    return made


def shifted(model: QuantizedModel) -> dict[str, tuple[str, ...]]:
    """Return the consumers whose biases absorbed something, and their scalings."""
    found = (s for s in model._parts.scalings if s.shifts is not None)
    return {name: tuple(map(name_of, s.repairs)) for s in found for name in s.chain.consumers}


def test_it_comes_after_the_factors_that_it_goes_with() -> None:
    given: tuple[Any, ...] = ("bias_correction", "gptq", ABSORBED, Repair(name="awq", alpha=0.5))
    assert [name_of(r) for r in in_order(given)] == ["awq", ABSORBED, "gptq", "bias_correction"]
    assert ABSORBED in SearchSpace().repairs
    assert REPAIRS.index("awq") < REPAIRS.index(ABSORBED) < REPAIRS.index("gptq")


@pytest.mark.parametrize(
    ("names", "recovery"),
    [
        ("b", (ABSORBED,)),
        ("b", (Repair(name="smoothquant", alpha=0.5), ABSORBED)),
        ("c", ("equalization", ABSORBED, "gptq", "bias_correction")),
        ("d", (Repair(name="awq", alpha=0.5), ABSORBED, "adaround")),
    ],
    ids=str,
)
@pytest.mark.parametrize("repairs", [(), _ALLOWED])
def test_a_rule_gets_exactly_what_it_asks_for(
    names: str, recovery: Any, repairs: tuple[str, ...]
) -> None:
    made = net()
    model = fit(made, rule(*recovery, names=names), repairs=repairs, data=[X])
    assert model.plan[names].recovery == recovery
    scalings = [s.repairs for s in model._parts.scalings if names in s.chain.consumers]
    assert scalings == [recovery[: len(scalings[0])]]
    assert shifted(model).keys() >= {names}
    with torch.no_grad():
        expected = made(X)
        found = without_plan(model)(X)
    assert float((found - expected).abs().max() / expected.abs().max()) < _FP32


def test_it_is_proposed_where_it_helps_and_can_be_switched_off() -> None:
    made = net()
    with_it, plain = fit(made, repairs=_ALLOWED, data=[X]), fit(made, repairs=(), data=[X])
    assert shifted(with_it).keys() >= {"b", "c"}
    for name, repairs in shifted(with_it).items():
        assert tuple(map(name_of, with_it.plan[name].recovery))[: len(repairs)] == repairs
    rows = {row.name: row for row in with_it.result.op_table}
    gain = rows["b"].repair_gain
    assert gain is not None
    assert gain > 5
    assert plain._parts.scalings == ()
    assert not any(config.recovery for config in plain.plan.values())
    with torch.no_grad():
        expected = made(X)
        assert torch.equal(without_plan(plain)(X), expected)
        found = without_plan(with_it)(X)
    assert float((found - expected).abs().max() / expected.abs().max()) < _FP32


def test_without_leave_nothing_is_absorbed() -> None:
    others = tuple(name for name in PROPOSED if name != ABSORBED)
    assert shifted(fit(net(), repairs=others, data=[X])) == {}
    asked = fit(net(), rule("smoothquant"), repairs=_ALLOWED, data=[X])
    assert "b" not in shifted(asked)


def test_ranges_are_those_of_what_is_left() -> None:
    model = fit(net(), rule(ABSORBED), rule(ABSORBED, names="c"), repairs=(), data=[X, X / 2])
    made = net()
    with torch.no_grad():
        for name, hidden in (("b", made.a(X)), ("c", made.b(made.a(X)).relu())):
            both = torch.cat(
                (hidden, made.a(X / 2) if name == "b" else made.b(made.a(X / 2)).relu())
            )
            low, high = both.amin(0), both.amax(0)
            taken = (low - (high - low) / 4).clamp_min(0)
            width = (high - low if name == "b" else high - taken).max()
            scale, _ = site_qparams(model.model, name)
            torch.testing.assert_close(scale, width / 255, rtol=1e-4, atol=0.0)


def test_a_corrected_bias_knows_what_was_absorbed() -> None:
    option = OpConfig(weight=W4, recovery=(ABSORBED, "gptq", "bias_correction"))
    made = net()
    model = fit(made, Rule(names=["b"], options=[option]), repairs=(), data=[X])
    only = {"b": model.plan["b"]}
    model._parts.model.apply(only)
    bare = model.model
    with torch.no_grad():
        found, expected = bare.b(bare.a(X)), made.b(made.a(X))
    error = (found - expected).mean(0)
    assert float(error.abs().max()) < _MEAN * float(expected.abs().max())
    assert float((found - expected).abs().max()) > 100 * float(error.abs().max())


def test_gptq_rounds_by_what_is_left() -> None:
    """By the moments of the raw inputs it would care for their constants alone."""
    made, errors = net(), []
    expected = made.b(made.a(X)).detach()
    for more in ((), ("gptq",)):
        option = OpConfig(weight=W4, recovery=(ABSORBED, *more))
        model = fit(made, Rule(names=["b"], options=[option]), repairs=(), data=[X])
        with torch.no_grad():
            found = model.model.b(model.model.a(X))
        errors.append(float((found - expected).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def padded() -> Any:
    layers = {"a": nn.Conv2d(1, 4, 3), "b": nn.Conv2d(4, 4, 3, padding=1), "c": nn.Linear(16, 5)}
    made: Any = Net(lambda net, x: net.c(net.b(net.a(x.view(-1, 1, 4, 4))).flatten(1)), **layers)
    return made


def low() -> Any:
    made = net()
    made.b.bias.data -= 200.0
    return made


def half() -> Any:
    return net().to(torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "names"), [(padded, "b"), (low, "c"), (half, "b")], ids=["padding", "zeros", "half"]
)
def test_what_cannot_be_absorbed_is_refused(make: Callable[[], Any], names: str) -> None:
    made = make()
    x = X.to(made.b.weight.dtype)
    with pytest.raises(SpaceError, match=f"^{names}: bias_absorption cannot .* no zero padding"):
        fit(made, rule(ABSORBED, names=names), data=[x])


def test_one_option_with_and_one_without_it_is_refused() -> None:
    options = [OpConfig(weight=W4, inputs=(A8,), recovery=r) for r in (("awq",), ("awq", ABSORBED))]
    with pytest.raises(SpaceError, match="ask for awq and awq with bias_absorption: give every"):
        fit(net(), Rule(names=["b"], options=options), data=[X])


def test_the_users_model_is_untouched() -> None:
    made = net()
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    pointers = [p.data_ptr() for p in made.parameters()]
    model = fit(made, repairs=_ALLOWED, data=[X], eval_func=agreement(made(X)), max_trials=4)
    assert shifted(model)
    assert [p.data_ptr() for p in made.parameters()] == pointers
    assert all(torch.equal(t, state[n]) for n, t in made.state_dict().items())


def test_where_nothing_is_quantized_fp32_comes_back_to_the_bit() -> None:
    made = net()
    expected = made(X).detach()
    score = lambda model: float(torch.equal(model(X), expected))  # noqa: E731
    model = fit(made, repairs=_ALLOWED, data=[X], eval_func=score, max_trials=3)
    assert model.result.quantized_ops == 0
    assert torch.equal(model(X), expected)
    assert all(torch.equal(t, made.state_dict()[n]) for n, t in model.state_dict().items())


_ALL = (Repair(name="smoothquant", alpha=0.5), ABSORBED, "gptq", "bias_correction")


def kept(folder: Path) -> QuantizedModel:
    model = fit(net(), rule(*_ALL), rule(*_ALL, names="c"), repairs=_ALLOWED, data=[X])
    assert shifted(model).keys() >= {"b", "c"}
    model.save(folder)
    return model


def test_saved_loaded_and_saved_again(tmp_path: Path) -> None:
    model = kept(tmp_path / "one")
    other = net()
    for parameter in other.parameters():
        parameter.data.fill_(0.5)
    loaded = quantization.load(tmp_path / "one", other)
    loaded.save(tmp_path / "two")
    again = quantization.load(tmp_path / "two", other)
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
        assert torch.equal(again(X), model(X))
    assert loaded.plan == model.plan
    stored = [[s.to_dict() for s in m._parts.scalings] for m in (model, loaded, again)]
    assert stored[0] == stored[1] == stored[2]


def test_a_directory_from_before_there_were_shifts_loads(tmp_path: Path) -> None:
    model = fit(net(), rule("smoothquant"), repairs=(), data=[X])
    model.save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    (entry,) = config["scalings"]
    assert entry.pop("shifts") is None
    del config["checksum"]
    path.write_text(json.dumps(config))
    loaded = quantization.load(tmp_path, net())
    assert loaded._parts.scalings[0].shifts is None
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_a_resumed_study_absorbs_the_same(tmp_path: Path) -> None:
    def run(name: str, max_trials: int) -> QuantizedModel:
        return fit(
            net(),
            repairs=_ALLOWED,
            data=[X],
            eval_func=agreement(net()(X).detach()),
            max_trials=max_trials,
            storage=f"sqlite:///{tmp_path}/tuning.db",
            study_name=name,
        )

    whole = run("whole", 6)
    assert shifted(whole)
    run("parts", 2)
    resumed = run("parts", 6)
    assert [t.plan for t in resumed.result.trials] == [t.plan for t in whole.result.trials]
    assert [s.to_dict() for s in resumed._parts.scalings] == [
        s.to_dict() for s in whole._parts.scalings
    ]
    with torch.no_grad():
        assert torch.equal(resumed(X), whole(X))
    before, after = without_plan(whole).state_dict(), without_plan(resumed).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["qat", "lsq"])
@pytest.mark.parametrize("loads", [False, True])
def test_it_can_be_trained(method: Any, loads: bool, tmp_path: Path) -> None:
    model = kept(tmp_path / "one")
    source = quantization.load(tmp_path / "one", net()) if loads else model
    target = 2 * net()(X).detach()
    trainable = quantization.prepare_qat(source, method=method, calib_dataloader=[X])
    optimizer = torch.optim.Adam(trainable.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (trainable(X) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    trained = trainable.to_quantized()
    assert [s.to_dict() for s in trained._parts.scalings] == [
        s.to_dict() for s in source._parts.scalings
    ]
    assert trained.plan["b"].recovery == _ALL[:2]
    trained.save(tmp_path / "two")
    again = quantization.load(tmp_path / "two", net())
    with torch.no_grad():
        assert torch.equal(again(X), trained(X))
