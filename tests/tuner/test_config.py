"""TuningConfig, SearchSpace and Rule: validated where they are built, and equal after JSON."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from strategies import STRATEGIES
from tuner.config import PRESETS, Rule, SearchSpace, TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.granularity import PerChannel
from tuner.schemes import OpConfig, TensorScheme

W4A8 = OpConfig(
    weight=TensorScheme(format="int4", granularity=PerChannel(0)),
    inputs=TensorScheme(format="uint8", symmetric=False),
)


def test_defaults_are_the_documented_ones() -> None:
    config = TuningConfig()
    assert config.model_dump() == {
        "goal": AccuracyGoal().model_dump(),
        "space": "int8",
        "strategy": "auto",
        "objective": "bops",
        "max_trials": 50,
        "timeout_s": None,
        "calib_samples": None,
        "seed": 0,
        "target": None,
    }


@pytest.mark.parametrize(
    "config",
    [
        TuningConfig(),
        TuningConfig(
            goal=AccuracyGoal(max_drop=0.5, relative=False, metric="f1"),
            space="mixed-int",
            strategy="tpe",
            objective="size",
            max_trials=0,
            timeout_s=1.5,
            calib_samples=7,
            seed=3,
            target="onnxruntime",
        ),
        TuningConfig(
            space=SearchSpace(
                preset="int4-weight-only",
                rules=[
                    Rule(op_types=["Linear"], names=["enc.*"], options=[W4A8, OpConfig.float()]),
                    Rule(options=[OpConfig(inputs=(TensorScheme(), None))]),
                ],
            )
        ),
    ],
)
def test_json_round_trip_and_hash(config: TuningConfig) -> None:
    again = TuningConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_by_name_and_in_a_space(preset: str) -> None:
    assert TuningConfig(space=preset).search_space == SearchSpace(preset=preset)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_of_the_table_is_valid(strategy: str) -> None:
    assert TuningConfig(strategy=strategy).strategy == strategy


@pytest.mark.parametrize(
    ("objective", "cost"), [("size", "size_bytes"), ("bops", "bops"), ("latency", "latency_ms")]
)
def test_an_objective_names_its_cost(objective: str, cost: str) -> None:
    assert TuningConfig(objective=objective).cost_name == cost


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"space": "mixed_int"}, "mixed-int"),
        ({"space": {"preset": "int"}}, "int8"),
        ({"strategy": "atuo"}, "auto"),
        ({"objective": "bop"}, "bops"),
        ({"max_trials": -1}, "greater than or equal to 0"),
        ({"timeout_s": 0}, "a timeout_s of 0 leaves no time"),
        ({"timeout_s": -3.5}, "leaves no time"),
        ({"timeout_s": math.nan}, "finite"),
        ({"calib_samples": 0}, "greater than 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"trials": 3}, "Extra inputs"),
        ({"goal": {"max_drop": -1}}, "greater than or equal to 0"),
    ],
)
def test_bad_values_are_refused_with_a_hint(arguments: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValidationError, match=hint):
        TuningConfig(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"options": []},
        {"op_types": ["Linear"]},
        {"op_types": [], "options": [W4A8]},
        {"names": "encoder.*", "options": [W4A8]},
        {"op_type": ["Linear"], "options": [W4A8]},
    ],
)
def test_bad_rules_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Rule(**arguments)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        TuningConfig().seed = 1


@pytest.mark.parametrize(
    ("granularity", "wrong"),
    [
        ({"kind": "per_block"}, "missing"),
        ({"kind": "per_group", "axis": 1}, "missing"),
        ({"kind": "per_block", "size": 0}, "greater_than"),
        ({"kind": "per_channel", "self": 1}, "extra_forbidden"),
        ({"kind": "per_nothing"}, "union_tag_invalid"),
    ],
)
def test_a_bad_granularity_in_json_is_a_validation_error(
    granularity: dict[str, object], wrong: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        TensorScheme.model_validate({"granularity": granularity})
    assert [error["type"] for error in caught.value.errors()] == [wrong]
