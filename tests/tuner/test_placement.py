"""A target takes options away that it cannot run, and has residual sums follow convolutions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.errors import SpaceError, StudyMismatchError, UnknownNameError
from tuner.quantized_model import QuantizedModel

X = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
W8 = TensorScheme(format="int8", granularity=PerChannel(0))


class Residual(nn.Module):
    """Two residual blocks, a sum without a convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.short = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.a(x)) + x)
        y = torch.relu(self.b(y) + self.short(y))
        y = torch.relu(y) + torch.sigmoid(y)
        return self.head(y.mean((2, 3)))


def fit(space: Any = "int8", target: str | None = "onnxruntime", **options: Any) -> QuantizedModel:
    torch.manual_seed(0)
    config = TuningConfig(space=space, target=target, max_trials=3)
    return quantization.fit(Residual().eval(), [X], config=config, **options)


def test_sums_that_convolutions_feed_are_quantized_with_them() -> None:
    plan = fit().plan
    first, second = plan["/add:0"], plan["/add:1"]
    assert "/add:2" not in plan
    for config in (first, second):
        assert config.weight is None
        assert [scheme.format for scheme in config.inputs or ()] == ["uint8", "uint8"]


def test_the_output_of_a_convolution_that_adds_is_rounded_once_as_a_sum() -> None:
    """OpenVINO's kernel adds to the first that nothing else reads, and rounds the sum alone."""
    plan = fit(target="openvino").plan
    for name in ("/add:0", "/add:1"):
        own, other = plan[name].inputs or ()
        assert own is None
        assert other.format == "uint8"


def test_the_output_of_a_convolution_that_others_read_is_rounded_by_itself() -> None:
    class Shared(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.head((torch.relu(y) + (y + self.b(y))).mean((2, 3)))

    torch.manual_seed(0)
    plan = quantization.fit(Shared().eval(), [X], config=TuningConfig(target="openvino")).plan
    shared, alone = plan["/add:0"].inputs or ()
    assert alone is None
    assert shared.format == "uint8"


def test_biases_of_convolutions_count_in_steps_of_their_products() -> None:
    """ONNX Runtime rounds them so, whatever the plan says: the simulation must know."""
    plan = fit().plan
    formats = {name: plan[name].bias and plan[name].bias.format for name in ("a", "b", "head")}
    assert formats == {"a": "int32", "b": "int32", "head": None}
    for target in (None, "onnx", "openvino"):
        assert fit(target=target).plan["a"].bias is None


def test_biases_of_rules_and_shared_ones_stay_as_they_are() -> None:
    given = OpConfig(weight=W8, inputs=TensorScheme(format="uint8", symmetric=False))
    rules = [Rule(names=["a"], options=[given])]
    assert fit(SearchSpace(preset="int8", rules=rules)).plan["a"].bias is None
    torch.manual_seed(0)
    model = Residual().eval()
    model.short.bias = model.b.bias
    plan = quantization.fit(model, [X], config=TuningConfig(target="onnxruntime")).plan
    assert plan["b"].weight is not None
    assert plan["b"].bias is None
    assert plan["short"].bias is None


def test_without_a_target_sums_stay_float() -> None:
    assert [name for name in fit(target=None).plan if "add" in name] == []


def test_a_sum_stays_float_where_no_convolution_before_it_is_quantized() -> None:
    floats = Rule(names=["b", "short"], options=[OpConfig.float()])
    plan = fit(SearchSpace(preset="int8", rules=[floats])).plan
    assert plan["/add:1"].is_float
    assert not plan["/add:0"].is_float


def test_what_reads_one_tensor_reads_one_scale() -> None:
    model = fit()
    graph = model._parts.model
    sums = graph.runtime.sites["/add:1"].inputs
    assert sums[0] is not None
    readers = [graph.runtime.sites[name].inputs[0] for name in ("b", "short")]
    scales = {float(q.qparams.scale) for q in readers if q is not None and q.qparams is not None}
    assert len(scales) == 1


def test_a_rule_on_sums_is_the_users_word() -> None:
    four = TensorScheme(format="uint4", symmetric=False)
    rule = Rule(op_types=["add"], options=[OpConfig(inputs=four)])
    plan = fit(SearchSpace(preset="int8", rules=[rule])).plan
    assert {s.format for s in plan["/add:0"].inputs or ()} == {"uint4"}


def test_every_trial_is_complete_and_the_first_is_the_same_again(tmp_path: Path) -> None:
    def eval_func(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(model(X).abs().mean())

    storage = f"sqlite:///{tmp_path}/study.db"
    once = fit(eval_func=eval_func, storage=storage, study_name="s")
    again = fit(eval_func=eval_func, storage=storage, study_name="s")
    assert [t.plan for t in again.result.trials] == [t.plan for t in once.result.trials]
    assert {frozenset(t.plan) for t in once.result.trials} == {frozenset(once.plan)}
    with pytest.raises(StudyMismatchError):
        fit(target=None, eval_func=eval_func, storage=storage, study_name="s")


def test_a_rule_that_the_target_cannot_run_is_refused_before_anything_runs() -> None:
    def never(model: nn.Module) -> float:
        raise AssertionError

    mx = Rule(names=["head"], options=[OpConfig(weight=W8, inputs=TensorScheme(format="mxfp4"))])
    with pytest.raises(SpaceError, match=r"head \(Linear\): target 'onnxruntime' cannot run"):
        fit(SearchSpace(preset="int8", rules=[mx]), eval_func=never)


def test_options_of_presets_that_the_target_cannot_run_are_left_out() -> None:
    model = fit("everything", eval_func=lambda m: 1.0)
    formats = {
        s.format for t in model.result.trials for c in t.plan.values() for s in c.inputs or ()
    }
    assert formats
    assert not any(name.startswith(("mx", "nv")) for name in formats)


def test_a_space_of_which_the_target_runs_nothing_is_refused() -> None:
    rule = Rule(names=["a", "b", "short"], options=[OpConfig.float()])
    with pytest.raises(SpaceError, match="can run no option of this space"):
        fit(SearchSpace(preset="mx", rules=[rule]))


def test_a_model_that_is_one_op_is_called_the_model_where_it_is_refused() -> None:
    model, config = nn.ConvTranspose2d(3, 8, 3), TuningConfig(target="onnxruntime")
    with pytest.raises(SpaceError, match="of the model: ONNX Runtime computes ConvTranspose2d"):
        quantization.fit(model.eval(), [torch.randn(2, 3, 8, 8)], config=config)


def test_an_unknown_target_is_refused_with_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        fit(target="onnxrutime")


class Capped(nn.Module):
    """Two layers whose channels differ by far, a ReLU6 between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cap, self.b = nn.Linear(6, 8), nn.ReLU6(), nn.Linear(8, 4)
        with torch.no_grad():
            self.a.weight *= torch.logspace(-2, 0, 8)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.cap(self.a(x)))


@pytest.mark.parametrize(("target", "is_scaled"), [(None, True), ("onnxruntime", False)])
def test_no_repair_leaves_an_op_that_the_target_cannot_fuse(
    target: str | None, is_scaled: bool
) -> None:
    torch.manual_seed(0)
    config = TuningConfig(target=target)
    model = quantization.fit(Capped().eval(), [torch.randn(64, 6)], config=config)
    assert bool(model._parts.scalings) is is_scaled
