"""What users have that textbooks have not, each once a defect."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tests.tuner.nets import ConvNet, Functional, Transposed, inputs_for, seeded
from tuner import (
    AccuracyGoal,
    OpConfig,
    PerChannel,
    PerToken,
    QuantizedModel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import EvaluationError, ModelError, PlanError, TunerError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::tuner.NothingQuantizedWarning")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def fit(model: nn.Module, loader: Any, **options: Any) -> QuantizedModel:
    options.setdefault("eval_func", lambda m: 1.0)
    return quantization.fit(model, loader, **options)


def weights_only(scheme: TensorScheme) -> TuningConfig:
    rule = Rule(op_types=["Linear"], options=[OpConfig(weight=scheme)])
    return TuningConfig(space=SearchSpace(rules=[rule]))


class _Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


@pytest.mark.parametrize("patched", [False, True])
def test_a_norm_that_does_more_is_not_folded(patched: bool) -> None:
    norm = nn.BatchNorm2d(8) if patched else _Activated(8)
    if patched:
        norm.forward = lambda x: F.relu(nn.BatchNorm2d.forward(norm, x))  # type: ignore[method-assign]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(8, 3, 8, 8)
    tuned = fit(model, [x])
    with torch.no_grad():
        error = (tuned(x) - model(x)).norm() / model(x).norm()
    assert float(error) < 0.05


def test_a_rule_may_take_fp32_away() -> None:
    result = fit(mlp(), [X], config=weights_only(TensorScheme())).result
    assert result.goal_met
    assert result.quantized_ops == 2


def test_what_is_saved_is_what_is_on_the_model(tmp_path: Path) -> None:
    tuned = fit(mlp(), [X])
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    tuned(X).sum().backward()
    optimizer.step()
    tuned.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", mlp())
    with torch.no_grad():
        gap = (again(X) - tuned(X)).abs().max() / tuned(X).abs().max()
    assert float(gap) < 0.05  # the trained weights, rounded once more


class _Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x)  # type: ignore[no-any-return]


def test_autocast_inside_the_model() -> None:
    assert fit(_Autocast(), [X]).result.quantized_ops == 2


class _Graph(nn.Module):
    """Every row looks at every other: a batch cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.linear(x)
        return F.softmax(y @ y.T + bias, -1) @ x


def test_batches_that_cannot_be_cut() -> None:
    model = fit(_Graph(), [(torch.randn(50, 8), torch.zeros(50, 50))])
    assert model.result.quantized_ops == 3
    assert all(row.predicted_damage > 0 for row in model.result.op_table)


def test_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6)

        def forward(self, x: PackedSequence) -> Tensor:
            assert isinstance(x, PackedSequence)
            return self.lstm(x)[0].data  # type: ignore[no-any-return]

    batch = pack_padded_sequence(torch.randn(9, 5, 8), torch.tensor([9, 9, 8, 8, 8]))
    assert fit(Packed(), [batch]).result.quantized_ops == 1


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (nn.Conv2d(4, 4, (3, 1), bias=False), nn.Conv2d(4, 4, (1, 3), bias=False)),
        (nn.Conv2d(4, 4, (3, 1), bias=False), nn.Conv2d(12, 4, 1, bias=False)),
    ],
)
def test_equal_numbers_of_elements_are_not_enough(
    saved: nn.Module, other: nn.Module, tmp_path: Path
) -> None:
    fit(nn.Sequential(saved), [torch.randn(2, 4, 8, 8)]).save(tmp_path / "out")
    with pytest.raises(PlanError, match="another architecture"):
        quantization.load(tmp_path / "out", nn.Sequential(other))


def test_a_resumed_study_keeps_the_ranges_it_was_judged_with(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/tuning.db"
    first = fit(mlp(), [X], storage=storage, study_name="s")
    again = fit(mlp(), [X * 0.01], storage=storage, study_name="s")
    with torch.no_grad():
        assert torch.equal(first(X), again(X))


def test_double_precision_models_round_trip(tmp_path: Path) -> None:
    tuned = fit(mlp().double(), [X.double()])
    tuned.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", mlp().double())
    with torch.no_grad():
        assert torch.equal(again(X.double()), tuned(X.double()))


def test_evaluations_do_not_touch_one_another() -> None:
    seen = []

    def eval_func(model: nn.Module) -> float:
        seen.append(float(model.bn3.running_mean.sum()))  # type: ignore[union-attr, operator]
        assert not model.training
        model.train()
        model(inputs)
        return 1.0

    net = seeded(Transposed)
    inputs = inputs_for(net, 16)
    space = SearchSpace(rules=[Rule(op_types=["Linear"], options=[OpConfig.float()])])
    config = TuningConfig(space=space, strategy="random", max_trials=3)
    tuned = fit(net, [inputs], eval_func=eval_func, config=config)
    assert len(set(seen)) == 1
    assert not tuned.model.training


def test_an_eval_func_that_changes_the_dtype_is_told() -> None:
    with pytest.raises(EvaluationError, match="type of the model's parameters"):
        fit(mlp(), [X], eval_func=lambda m: float(len(str(m.double()))))


@pytest.mark.parametrize("how", ["plain", "new objects", "raising"])
def test_a_changed_dtype_fails_one_evaluation_and_not_the_next(how: str) -> None:
    seen: list[tuple[set[torch.dtype], bool]] = []
    net = seeded(ConvNet)
    x, names = inputs_for(net), ("int8", "int4")

    def eval_func(model: nn.Module) -> float:
        tensors = [*model.parameters(), *model.buffers()]
        seen.append(({t.dtype for t in tensors if t.is_floating_point()}, model.training))
        score = float(model(x).detach().norm())
        if len(seen) in (2, 4):
            torch.__future__.set_overwrite_module_params_on_conversion(how == "new objects")
            model.half()
            if how == "raising":
                raise ArithmeticError("no such score")
        return score

    try:
        rows = quantization.sweep(net, [x], eval_func, names, progress=False).rows
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)

    def norm(model: nn.Module) -> float:
        return float(model(x).detach().norm())

    alone = quantization.sweep(net, [x], norm, names, progress=False).rows
    assert seen == [({torch.float32}, False)] * 7
    wanted = "ArithmeticError" if how == "raising" else "type of the model's parameters"
    for index, (row, other) in enumerate(zip(rows, alone, strict=True)):
        if index in (0, 2):
            assert wanted in str(row.reason)
        else:
            assert row.accuracy == other.accuracy


def test_what_eval_func_raises_is_not_hidden_by_what_it_did() -> None:
    def eval_func(model: nn.Module) -> float:
        model.double()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), [X], eval_func=eval_func)


def test_a_weight_used_whole_and_in_part() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.linear = nn.Linear(16, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.linear(self.embed(tokens)), self.embed.weight[:40])

    result = fit(Sliced(), [torch.randint(0, 50, (8, 5))]).result
    ratio = result.best.costs["size_bytes"] / result.baseline_costs["size_bytes"]
    assert 0.25 < ratio < 0.5


@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme(granularity=PerToken()),
        TensorScheme(format="uint8", granularity=PerChannel(0)),
        TensorScheme(format="uint8", symmetric=False, granularity=PerChannel(0)),
    ],
)
def test_costs_count_every_scale_and_zero_point(scheme: TensorScheme, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 512, bias=False))
    tuned = fit(model, [torch.randn(4, 64)], config=weights_only(scheme))
    path = tuned.save(tmp_path / "out") / "weights.safetensors"
    data = path.read_bytes()
    stored = len(data) - 8 - int.from_bytes(data[:8], "little")
    assert tuned.result.best.costs["size_bytes"] == stored
    again = quantization.load(tmp_path / "out", nn.Sequential(nn.Linear(64, 512, bias=False)))
    with torch.no_grad():
        assert torch.equal(again(X[:, :1].expand(16, 64)), tuned(X[:, :1].expand(16, 64)))


def test_products_with_vectors_are_counted() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.v = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(self.linear(x), self.v)

    assert fit(Vector(), [X]).result.uncovered == {"/mv": 8}


def test_recurrent_macs_do_not_hang_on_parameter_names() -> None:
    plain, normed = nn.LSTM(8, 8), parametrizations.weight_norm(nn.LSTM(8, 8), "weight_hh_l0")
    costs = [
        fit(nn.Sequential(m), [torch.randn(16, 4, 8)]).result.baseline_costs["bops"]
        for m in (plain, normed)
    ]
    assert costs[0] == costs[1]


def test_a_model_of_embeddings_alone_is_quantized() -> None:
    result = fit(nn.EmbeddingBag(100, 16), [torch.randint(0, 100, (16, 4))]).result
    assert result.quantized_ops == 1


def test_what_was_reached_is_not_called_unreached() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.ModuleDict({"a/b": nn.Linear(8, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return self.d["a/b"](x)  # type: ignore[no-any-return]

    assert fit(Root(), [X]).result.unreached == ()
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    tuned = fit(attention, [(x, x, x)])
    assert tuned.result.unreached == ()
    assert tuned.result.quantized_ops == 6


@pytest.mark.parametrize("net_type", [ConvNet, Functional])
def test_pickle_copy_and_torch_save(net_type: type[nn.Module]) -> None:
    net = seeded(net_type)
    x = inputs_for(net)
    model = fit(net, [x]).model
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model),
    ]
    with torch.no_grad():
        for twin in twins:
            assert torch.equal(twin(x), model(x))
            assert str(twin) == str(model)


def test_refused_rather_than_ignored() -> None:
    rule = Rule(op_types=["Linear"], options=[OpConfig(weight=TensorScheme(), recovery=("qat",))])
    with pytest.raises(UnsupportedError, match="recovery"):
        fit(mlp(), [X], config=TuningConfig(space=SearchSpace(rules=[rule])))
    config = TuningConfig(goal=AccuracyGoal(metric="top1"))
    with pytest.raises(EvaluationError, match="top1"):
        fit(mlp(), [X], config=config)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_that_are_not_ready() -> None:
    with pytest.raises(ModelError, match="lazy"):
        fit(nn.Sequential(nn.LazyLinear(8)), [X])
    tuned = fit(mlp(), [X])
    for again in (tuned, tuned.model):
        with pytest.raises(ModelError, match="FP32 model"):
            fit(again, [X])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"storage": 5}, "storage is a int"),
        ({"study_name": 5}, "study_name is a int"),
        ({"callbacks": print}, "give a list"),
        ({"callbacks": [3]}, "each of callbacks"),
        ({"eval_func": lambda m: 10**400}, "finite"),
        ({"eval_func": lambda m: torch.tensor(False)}, "bool"),
    ],
)
def test_small_mistakes(options: dict[str, Any], says: str) -> None:
    with pytest.raises(TunerError, match=says):
        fit(mlp(), [X], **options)
