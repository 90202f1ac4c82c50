"""Presets, rules and tied weights."""

import pytest
import torch
from torch import nn

from strategies.uniform import UniformPlan, uniform_plans
from tests.tuner.nets import (
    Attention,
    Autoencoder,
    ConvNet,
    Functional,
    Mirrored,
    Pooling,
    Recurrent,
    Tied,
    Transposed,
    inputs_for,
    seeded,
)
from tuner.config import Rule, SearchSpace, TuningConfig
from tuner.errors import SpaceError, UnsupportedError
from tuner.granularity import PerChannel, PerGroup, PerTensor
from tuner.preparation import Preparation, Prepared
from tuner.presets import preset_candidates
from tuner.progress import Progress
from tuner.schemes import OpConfig, TensorScheme
from tuner.search_space import calibration_variants

W4 = TensorScheme(format="int4", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)


def prepared(net: nn.Module, space: str | SearchSpace, objective: str = "bops") -> Prepared:
    config = TuningConfig(space=space, objective=objective)
    preparation = Preparation(net, [inputs_for(net, 16)], None, config)
    preparation.record()
    return preparation.finish(Progress(False))


def labels(ready: Prepared) -> dict[str, list[str]]:
    return {unit.name: [c.label for c in unit.choices] for unit in ready.space.units}


MIXED = ["W8A8", "W6A8", "W4A8", "W3A8", "W2A8", "W6A6", "W4A6", "W4A4", "W3A4", "W2A4", "FP32"]


def test_int8() -> None:
    assert labels(prepared(seeded(Attention), "int8")) == {
        "attention/q_proj": ["W8A8", "FP32"],
        "attention/k_proj": ["W8A8", "FP32"],
        "attention/v_proj": ["W8A8", "FP32"],
        "attention/matmul:0": ["A8", "FP32"],
        "attention/matmul:1": ["A8", "FP32"],
        "attention/out_proj": ["W8A8", "FP32"],
    }


def test_mixed_int_with_tied_weights() -> None:
    ready = prepared(seeded(Tied), "mixed-int")
    assert labels(ready) == {"embed": MIXED, "body": MIXED}
    tied = ready.space.units[0]
    for choice in tied.choices:
        assert choice.configs["embed"].weight == choice.configs["head"].weight
        assert choice.configs["embed"].inputs is None


PRESETS = ("int8", "int8-dynamic", "int4-weight-only", "mixed-int", "fp8", "mx", "everything")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("net_type", [Autoencoder, Mirrored])
def test_a_weight_with_two_axes_has_the_options_of_its_first_use(
    net_type: type[nn.Module], preset: str
) -> None:
    ready = prepared(seeded(net_type), preset)
    (unit,) = ready.space.units
    quantizing = [choice for choice in unit.choices if choice.label != "FP32"]
    first = next(iter(ready.graph.ops))
    for choice in quantizing:
        ready.model.apply(choice.configs)
        assert len({config.weight for config in choice.configs.values()}) == 1
    shapes = {name: tuple(p.shape) for name, p in seeded(net_type).named_parameters()}
    alone = preset_candidates(preset, ready.graph.ops[first], shapes)
    assert [c.configs[first].weight for c in quantizing] == [c.config.weight for c in alone]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_vector_has_no_scale_for_each_value(preset: str) -> None:
    (unit,) = prepared(seeded(Pooling), preset).space.units
    schemes = [choice.configs["/matmul:0"].weight for choice in unit.choices]
    assert not any(isinstance(s.granularity, PerChannel) for s in schemes if s is not None)
    assert any(s is not None for s in schemes)


def test_mixed_int_of_ops_without_a_weight_or_without_inputs() -> None:
    found = labels(prepared(seeded(Functional), "mixed-int"))
    assert found["/bmm:0"] == ["A8", "A6", "A4", "FP32"]
    assert labels(prepared(seeded(Recurrent), "mixed-int"))["embed"] == [
        "W8",
        "W6",
        "W4",
        "W3",
        "W2",
        "FP32",
    ]


def test_schemes_of_the_presets() -> None:
    choice = prepared(seeded(Transposed), "int8").space.units[1].choices[0]
    config = choice.configs["up"]
    assert config.weight is not None
    assert config.weight.granularity == PerChannel(1)
    assert config.weight.symmetric
    scheme = config.input_scheme(0)
    assert scheme is not None
    assert (scheme.granularity, scheme.symmetric, scheme.dynamic) == (PerTensor(), False, False)
    dynamic = prepared(seeded(ConvNet), "int8-dynamic").space.units[2].choices[0]
    scheme = dynamic.configs["head"].input_scheme(0)
    assert scheme is not None
    assert scheme.granularity.kind == "per_token"


@pytest.mark.parametrize(("features", "size"), [(256, 128), (96, 32), (50, 32)])
def test_groups_divide_where_they_can(features: int, size: int) -> None:
    net = nn.Sequential(nn.Linear(features, 4))
    preparation = Preparation(
        net, [torch.randn(4, features)], None, TuningConfig(space="int4-weight-only")
    )
    preparation.record()
    config = preparation.finish(Progress(False)).space.units[0].choices[0].configs["0"]
    assert config.weight is not None
    assert config.weight.granularity == PerGroup(size, -1)
    assert config.inputs is None


def test_costs_add_up_to_those_of_the_plan() -> None:
    ready = prepared(seeded(Tied), "mixed-int")
    for index in (0, 4, len(MIXED) - 1):
        assignment = (index,) * len(ready.space.units)
        costs = ready.costs.costs(ready.space.plan(assignment))
        total = ready.space.space.cost(assignment)
        # beside the objective, size weighs a thousandth of what bops do
        assert total == pytest.approx(costs.bops, rel=0.2, abs=2e-3 * ready.costs.costs({}).bops)
        assert ready.space.assignment(ready.space.plan(assignment)) == assignment


def test_rules_replace_and_the_last_wins() -> None:
    space = SearchSpace(
        preset="int8",
        rules=[
            Rule(op_types=["Conv2d"], options=[OpConfig(weight=W4, inputs=A8)]),
            Rule(names=["dep*"], options=[OpConfig(weight=W4), OpConfig.float()]),
        ],
    )
    assert labels(prepared(seeded(ConvNet), space)) == {
        "conv": ["W4A8"],
        "depthwise": ["W4", "FP32"],
        "head": ["W8A8", "FP32"],
    }


def test_ops_outside_presets_come_in_when_named_or_typed_but_not_by_a_glob() -> None:
    inputs = [OpConfig(inputs=A8), OpConfig.float()]
    by_glob = SearchSpace(rules=[Rule(names=["*"], options=inputs)])
    found = labels(prepared(seeded(Functional), by_glob))
    assert "/add:0" not in found
    assert "/softmax:0" not in found
    by_type = SearchSpace(rules=[Rule(op_types=["add", "Softmax", "cat"], options=inputs)])
    found = labels(prepared(seeded(Functional), by_type))
    assert {"/add:0", "/softmax:0", "/cat:0"} <= set(found)
    by_name = SearchSpace(rules=[Rule(names=["/mul:0"], options=inputs)])
    assert "/mul:0" in labels(prepared(seeded(Functional), by_name))


def test_options_with_equal_bits_keep_apart() -> None:
    other = A8.model_copy(update={"calibration": "percentile"})
    options = [OpConfig(weight=W4, inputs=A8), OpConfig(weight=W4, inputs=other)]
    space = SearchSpace(rules=[Rule(names=["head"], options=options)])
    assert labels(prepared(seeded(ConvNet), space))["head"] == ["W4A8", "W4A8#2"]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule(names=["hed"], options=[OpConfig.float()]), "head"),
        (Rule(op_types=["Conv2D"], options=[OpConfig.float()]), "Conv2d"),
        (Rule(op_types=["Linear"], names=["conv"], options=[OpConfig.float()]), "nothing"),
        (Rule(names=["head"], options=[OpConfig(inputs=(A8, A8, A8))]), "operands"),
    ],
)
def test_rules_that_cannot_work_are_refused(rule: Rule, says: str) -> None:
    with pytest.raises(SpaceError, match=says):
        prepared(seeded(ConvNet), SearchSpace(rules=[rule]))


def test_an_option_that_would_change_nothing_is_refused() -> None:
    rule = Rule(names=["/bmm:0"], options=[OpConfig(weight=W4)])
    with pytest.raises(SpaceError, match="change nothing"):
        prepared(seeded(Functional), SearchSpace(rules=[rule]))


FP8 = ["W8:e4m3fn A8:e4m3fn", "W8:e4m3fn A8:e5m2", "W8A8"]
MX = [
    "W8:mxfp8_e4m3 A8:mxfp8_e4m3",
    "W6:mxfp6_e2m3 A6:mxfp6_e2m3",
    "W4:mxfp4 A8:mxfp8_e4m3",
    "W4:mxfp4 A4:mxfp4",
    "W4:nvfp4 A4:nvfp4",
]


def test_fp8() -> None:
    ready = prepared(seeded(Attention), "fp8")
    found = labels(ready)
    assert found["attention/q_proj"] == [*FP8, "FP32"]
    assert found["attention/matmul:0"] == ["A8:e4m3fn", "A8:e5m2", "A8", "FP32"]
    config = ready.space.units[0].choices[1].configs["attention/q_proj"]
    assert config.weight == TensorScheme(format="e4m3fn", granularity=PerChannel(0))
    scheme = config.input_scheme(0)
    assert scheme is not None
    assert (scheme.format, scheme.granularity, scheme.dynamic) == ("e5m2", PerTensor(), False)
    assert labels(prepared(seeded(Recurrent), "fp8"))["embed"] == ["W8:e4m3fn", "W8", "FP32"]


def test_mx_where_blocks_lie_along_the_axis_that_is_summed() -> None:
    fp8 = ["W8:e4m3fn A8:e4m3fn", "W8A8", "FP32"]
    products = ["A8:e4m3fn", "A8", "FP32"]
    assert labels(prepared(seeded(ConvNet), "mx")) == {
        "conv": fp8,
        "depthwise": fp8,
        "head": [*MX, "FP32"],
    }
    found = labels(prepared(seeded(Functional), "mx"))
    assert found["/linear:0"] == [*MX, "FP32"]
    assert found["/matmul:0"] == [*MX, "FP32"]  # y @ kᵀ: k is stored [out, in]
    assert found["/bmm:0"] == products
    assert found["/scaled_dot_product_attention:0"] == products
    recurrent = labels(prepared(seeded(Recurrent), "mx"))
    assert recurrent["lstm"] == [*MX, "FP32"]
    assert recurrent["embed"] == [
        *("W8:mxfp8_e4m3", "W6:mxfp6_e2m3", "W4:mxfp4", "W4:nvfp4", "FP32")
    ]
    assert labels(prepared(seeded(Tied), "mx")) == {"embed": [*MX, "FP32"], "body": [*MX, "FP32"]}


class _ByColumns(nn.Module):
    """Sums over the first axis of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


def test_mx_leaves_out_parameters_that_are_stored_the_other_way() -> None:
    preparation = Preparation(_ByColumns(), [torch.randn(4, 16)], None, TuningConfig(space="mx"))
    preparation.record()
    unit = preparation.finish(Progress(False)).space.units[0]
    assert [c.label for c in unit.choices] == ["W8:e4m3fn A8:e4m3fn", "W8A8", "FP32"]


def test_everything_has_all_presets_under_names_of_their_own() -> None:
    ready = prepared(seeded(Recurrent), "everything")
    found = labels(ready)
    more = ["W8A8 dynamic", "W4 grouped", "W8 grouped"]
    assert found["head"] == [*MIXED[:-1], *FP8[:2], *MX, *more, "FP32"]
    assert len(found["embed"]) == len(set(found["embed"]))
    for unit in ready.space.units:
        configs = [tuple(choice.configs.values()) for choice in unit.choices]
        assert len(configs) == len(set(configs))


def test_uniform_plans_of_formats_keep_apart() -> None:
    """Every unit takes what it has closest: convolutions have 8 bits only."""
    ready = prepared(seeded(ConvNet), "mx")
    plans = {plan.label: ready.space.plan(plan.assignment) for plan in _uniform(ready)}
    assert set(plans) == {*MX[1:], "W8:e4m3fn A8:e4m3fn", "W8A8"}  # the first: MX[0] where it is
    assert plans["W8:e4m3fn A8:e4m3fn"]["head"].weight == TensorScheme(format="mxfp8_e4m3")
    chosen = plans["W4:mxfp4 A8:mxfp8_e4m3"]["head"]
    assert chosen.weight is not None
    assert chosen.weight.format == "mxfp4"
    assert not any(config.is_float for plan in plans.values() for config in plan.values())


def _uniform(ready: Prepared) -> tuple[UniformPlan, ...]:
    return uniform_plans(ready.space.space)


def test_training_is_refused_without_a_function_for_it() -> None:
    rule = Rule(options=[OpConfig(weight=W4, recovery=("lsq",))])
    with pytest.raises(UnsupportedError, match="recovery"):
        prepared(seeded(ConvNet), SearchSpace(rules=[rule]))


@pytest.mark.parametrize(
    ("scheme", "methods"),
    [
        (TensorScheme(format="e5m2"), ["minmax", "mse", "percentile"]),
        (TensorScheme(format="uint8", calibration="mse"), ["mse", "minmax", "percentile"]),
        (TensorScheme(format="e5m2", calibration="ema"), ["ema"]),
        (TensorScheme(format="e5m2", dynamic=True), ["minmax"]),
        (TensorScheme(format="mxfp4"), ["minmax"]),
        (TensorScheme(format="fp16"), ["minmax"]),
    ],
)
def test_calibration_methods_that_are_tried(scheme: TensorScheme, methods: list[str]) -> None:
    variants = calibration_variants(scheme)
    assert [variant.calibration for variant in variants] == methods
    assert {v.model_copy(update={"calibration": "minmax"}) for v in variants} == {
        scheme.model_copy(update={"calibration": "minmax"})
    }


def test_nothing_to_quantize() -> None:
    with pytest.raises(SpaceError, match="nothing in this model can be quantized"):
        Preparation(nn.ReLU(), [torch.randn(2, 3)], None, TuningConfig()).record()


def two_sums_after_one() -> Prepared:
    class TwoSums(nn.Module):
        """Two sums that follow the same convolution, each with a convolution of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return (y + self.b(x)) * (y + self.c(x))

    torch.manual_seed(0)
    config = TuningConfig(target="onnxruntime")
    preparation = Preparation(TwoSums().eval(), [torch.randn(8, 3, 4, 4)], None, config)
    preparation.record()
    return preparation.finish(Progress(False))


def test_each_sum_that_follows_an_op_counts_among_what_the_op_harms() -> None:
    ready = two_sums_after_one()
    assert [f.leaders for f in ready.space.followers] == [("a", "b"), ("a", "c")]
    option = ready.space.space.units[0].options[0]
    own = ready.damages["a"][ready.space.units[0].choices[0].configs["a"]]
    sums = [ready.damages[f.name][f.config] for f in ready.space.followers]
    assert min(sums) > 0
    assert option.damage == pytest.approx(own + sum(sums))
