"""Repaired models saved, loaded and copied; studies with repairs resumed; every kind of op."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import (
    Attention,
    Functional,
    Tied,
    Transposed,
    inputs_for,
    main_output,
    seeded,
)
from tests.tuner.recovery.chain_nets import Net, spread
from tests.tuner.test_repairs_in_fit import A8, X, agreement, fit, mlp, rule
from tuner import (
    AccuracyGoal,
    OpConfig,
    PerChannel,
    PerGroup,
    QuantizedModel,
    Rule,
    TensorScheme,
    quantization,
)
from tuner.errors import SpaceError, StorageError
from tuner.repairs import name_of

_EVERYTHING = ("equalization", "gptq", "bias_correction")


def weight(bits: int, axis: int = 0) -> TensorScheme:
    return TensorScheme(format=f"int{bits}", granularity=PerChannel(axis))


def option(*recovery: Any, bits: int = 4, axis: int = 0, **fields: Any) -> OpConfig:
    return OpConfig(weight=weight(bits, axis), inputs=(A8,), recovery=recovery, **fields)


def seen(net: nn.Module, *rules: Rule, x: Any = None, **options: Any) -> QuantizedModel:
    return fit(net, *rules, data=[inputs_for(net, 64) if x is None else x], **options)


def moved(net: nn.Module) -> nn.Module:
    """Return the architecture with other weights."""
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        parameter.data.fill_(0.5)
    return other


def _dict(net: Any, x: Tensor) -> dict[str, Tensor]:
    return {"logits": net.c(net.act(net.b(net.a(x).relu())))}


CASES: dict[str, Callable[[], tuple[QuantizedModel, nn.Module, Tensor]]] = {}


def case(function: Callable[[], tuple[QuantizedModel, nn.Module, Tensor]]) -> Any:
    CASES[function.__name__.strip("_")] = function
    return function


def fitted(net: nn.Module, *rules: Rule, x: Any = None, **options: Any) -> Any:
    x = inputs_for(net, 64) if x is None else x
    return seen(net, *rules, x=x, **options), net, x


@case
def _relu6_and_everything() -> Any:
    return fitted(mlp(), rule(*_EVERYTHING), rule("awq", "adaround", names="c"), x=X)


@case
def _int32_bias() -> Any:
    bias = TensorScheme(format="int32")
    return fitted(mlp(), rule(*_EVERYTHING, bias=bias), x=X)


@case
def _groups_of_a_float_format() -> Any:
    scheme = TensorScheme(format="e2m1", granularity=PerGroup(16))
    config = OpConfig(weight=scheme, recovery=("awq", "gptq"))
    return fitted(mlp(), Rule(names=["b"], options=[config]), x=X)


@case
def _blocks() -> Any:
    config = OpConfig(weight=TensorScheme(format="mxfp4"), recovery=("gptq", "bias_correction"))
    return fitted(mlp(), Rule(names=["b"], options=[config]), x=X)


@case
def _bfloat16() -> Any:
    return fitted(mlp().to(torch.bfloat16), rule(*_EVERYTHING), x=X.to(torch.bfloat16))


@case
def _transposed_convolutions() -> Any:
    recovery = ("equalization", "adaround", "bias_correction")
    rules = [
        Rule(op_types=["ConvTranspose1d"], options=[option(*recovery, bits=3, axis=1)]),
        Rule(names=["head"], options=[option("smoothquant", "gptq")]),
    ]
    return fitted(spread(seeded(Transposed)), *rules)


@case
def _channels_last() -> Any:
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 3, groups=2), "c": nn.Linear(128, 5)}
    net = Net(lambda net, x: net.c(net.b(net.a(x).relu()).relu().flatten(1)), **layers)
    spread(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last)
    return fitted(net, Rule(names=["b", "c"], options=[option(*_EVERYTHING)]), x=x)


@case
def _parts_of_attention() -> Any:
    return fitted(seeded(Attention), Rule(op_types=["Linear"], options=[option("gptq")]))


@case
def _functional_products() -> Any:
    return fitted(seeded(Functional), Rule(op_types=["Linear"], options=[option("gptq")]))


@case
def _tied_weights() -> Any:
    return fitted(seeded(Tied), Rule(names=["body"], options=[option("gptq", "bias_correction")]))


@case
def _a_dict_comes_out() -> Any:
    net = mlp()
    net.run = _dict
    return fitted(net, rule(*_EVERYTHING), x=X)


@pytest.mark.parametrize("name", CASES)
def test_saved_loaded_and_saved_again(name: str, tmp_path: Path) -> None:
    model, net, x = CASES[name]()
    used = {name_of(r) for config in model.plan.values() for r in config.recovery}
    assert used
    model.save(tmp_path / "one")
    loaded = quantization.load(tmp_path / "one", moved(net))
    loaded.save(tmp_path / "two")
    again = quantization.load(tmp_path / "two", moved(net))
    with torch.no_grad():
        expected = main_output(model(x))
        assert torch.equal(main_output(loaded(x)), expected)
        assert torch.equal(main_output(again(x)), expected)
        assert torch.equal(main_output(copy.deepcopy(model)(x)), expected)
    assert loaded.plan == model.plan
    stored = [(tmp_path / n / "weights.safetensors").read_bytes() for n in ("one", "two")]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("name", ["relu6_and_everything", "int32_bias", "transposed_convolutions"])
def test_a_loaded_model_can_be_trained_and_saved(name: str, tmp_path: Path) -> None:
    model, net, x = CASES[name]()
    model.save(tmp_path / "one")
    loaded = quantization.load(tmp_path / "one", moved(net))
    optimizer = torch.optim.SGD(loaded.parameters(), 1e-3)
    main_output(loaded(x)).square().mean().backward()
    optimizer.step()
    loaded.save(tmp_path / "two")
    second = quantization.load(tmp_path / "two", moved(net))
    second.save(tmp_path / "three")
    third = quantization.load(tmp_path / "three", moved(net))
    with torch.no_grad():
        found, expected = main_output(third(x)), main_output(second(x))
        assert torch.equal(found, expected)
        assert not torch.equal(found, main_output(model(x)))


def test_a_tied_weight_is_not_rounded_by_one_of_its_ops() -> None:
    with pytest.raises(SpaceError, match="head: its weight cannot be rounded"):
        seen(seeded(Tied), Rule(names=["head"], options=[option("gptq")]))


def test_batches_that_are_mappings() -> None:
    net = mlp()
    plain = net.run
    net.run = lambda self, x: plain(self, x)
    model = fit(net, rule(*_EVERYTHING), data=[{"x": X}, {"x": X + 0.1}])
    assert model.plan["b"].recovery == _EVERYTHING


def test_where_a_later_batch_takes_a_branch_weights_are_rounded_and_no_channel_scaled() -> None:
    net = mlp(late=nn.Linear(32, 5))
    net.run = lambda self, x: (self.late if float(x.sum()) > 0 else self.c)(self.b(self.a(x)))
    model = fit(net, rule("gptq", "bias_correction"), data=[-X.abs(), X.abs()])
    assert model.plan["b"].recovery == ("gptq", "bias_correction")
    assert not model.plan["late"].is_float
    assert model._parts.scalings == ()


class Study:
    """Runs of one study in a database, its evaluations counted."""

    def __init__(self, folder: Path) -> None:
        self.evaluations = 0
        self._url = f"sqlite:///{folder}/tuning.db"
        self._score = agreement(mlp()(X).detach())

    def run(self, name: str, max_trials: int, **options: Any) -> QuantizedModel:
        def score(model: Any) -> float:
            self.evaluations += 1
            return self._score(model)

        return fit(
            mlp(),
            eval_func=score,
            max_trials=max_trials,
            goal=AccuracyGoal(max_drop=0.03),
            storage=self._url,
            study_name=name,
            **options,
        )


def test_a_resumed_study_is_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    study = Study(tmp_path)
    whole = study.run("whole", 12)
    assert any(config.recovery for config in whole.plan.values())
    assert whole._parts.scalings
    in_one = study.evaluations
    study.run("parts", 2)
    study.run("parts", 5)
    resumed = study.run("parts", 12)
    assert study.evaluations == 2 * in_one
    assert [t.plan for t in resumed.result.trials] == [t.plan for t in whole.result.trials]
    assert resumed.plan == whole.plan
    assert [s.to_dict() for s in resumed._parts.scalings] == [
        s.to_dict() for s in whole._parts.scalings
    ]
    with torch.no_grad():
        assert torch.equal(resumed(X), whole(X))
    rows = zip(resumed.result.op_table, whole.result.op_table, strict=True)
    assert all(a == b for a, b in rows)


def test_a_study_with_other_repairs_is_another_one(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.run("mine", 2)
    with pytest.raises(StorageError, match="space"):
        study.run("mine", 4, repairs=())
    before = study.evaluations
    study.run("mine", 2)
    assert study.evaluations == before


def test_a_study_resumed_to_its_fp32_end_gives_fp32_back(tmp_path: Path) -> None:
    expected = mlp()(X).detach()
    url = f"sqlite:///{tmp_path}/tuning.db"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trials in (1, 3):
            model = fit(
                mlp(),
                eval_func=lambda model: float(torch.equal(model(X), expected)),
                max_trials=trials,
                storage=url,
                study_name="none",
            )
    assert model.result.quantized_ops == 0
    assert torch.equal(model(X), expected)
