"""fit() with number formats beyond integers, on a model that was trained."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strategies import STRATEGIES
from tuner import (
    AccuracyGoal,
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
from tuner.errors import StorageError
from tuner.recipes.digits import TopOneAccuracy, digits

SPACES = ("fp8", "mx", "everything")


class Reader(nn.Module):
    """Reads a digit row by row: a convolution, attention and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.rows = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).transpose(1, 2).flatten(2)
        x = F.relu(self.rows(x))
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + y).flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trained() -> Reader:
    """Return the reader after a short training."""
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Reader()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(8):
            for batch in torch.randperm(len(data.train_images)).split(64):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(data.train_images[batch]), data.train_labels[batch])
                loss.backward()
                optimizer.step()
    assert eval_func()(net.eval()) > 0.9
    return net


def eval_func() -> TopOneAccuracy:
    data = digits()
    return TopOneAccuracy(data.test_images[:400], data.test_labels[:400])


def batches() -> Iterator[Tensor]:
    yield from digits().train_images[:128].split(64)


def fit(
    net: nn.Module, space: str | SearchSpace, trials: int = 6, **options: str
) -> QuantizedModel:
    strategy = options.pop("strategy", "auto")
    config = TuningConfig(
        space=space, strategy=strategy, max_trials=trials, goal=AccuracyGoal(max_drop=0.03)
    )
    return quantization.fit(net, batches(), eval_func(), config, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("space", SPACES)
def test_every_strategy_finds_a_plan_that_is_saved(
    space: str, strategy: str, trained: Reader, tmp_path: Path
) -> None:
    model = fit(trained, space, strategy=strategy)
    result = model.result
    assert result.goal_met
    assert result.quantized_ops > 0
    assert result.best.costs["bops"] < 0.07 * result.baseline_costs["bops"]
    assert all(trial.state == "complete" for trial in result.trials)
    model.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", Reader())
    x = digits().test_images[:64]
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.result.to_dict() == result.to_dict()
    assert all(row.choice in again.summary() for row in result.op_table)


@pytest.mark.parametrize("space", SPACES)
def test_without_an_eval_func_the_first_option_is_taken(space: str, trained: Reader) -> None:
    model = quantization.fit(trained, batches(), config=TuningConfig(space=space))
    first = {"fp8": "e4m3fn", "mx": "mxfp8_e4m3", "everything": "int8"}
    weight = model.plan["head"].weight
    assert weight is not None
    assert weight.format == first[space]
    assert eval_func()(model) > eval_func()(trained) - 0.02


def _damage(net: nn.Module, name: str) -> float:
    scheme = TensorScheme(format=name)
    rule = Rule(op_types=["Linear"], options=[OpConfig(weight=scheme, inputs=scheme)])
    space = SearchSpace(preset="int8", rules=[rule])
    table = quantization.fit(net, batches(), config=TuningConfig(space=space)).result.op_table
    return sum(row.predicted_damage for row in table if row.type == "Linear")


def test_predicted_damage_of_formats_has_the_order_of_their_errors(trained: Reader) -> None:
    names = ("fp16", "bf16", "mxfp8_e4m3", "nvfp4", "mxfp4", "int4", "int2")
    damages = [_damage(trained, name) for name in names]
    assert damages == sorted(damages)
    assert 0 < damages[0] < 1e-3 * damages[2]


@pytest.mark.parametrize("space", SPACES)
def test_a_stored_study_goes_on(space: str, trained: Reader, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'tuning.db'}"
    options = {"storage": storage, "study_name": "study"}
    whole = fit(trained, space, trials=6).result
    fit(trained, space, trials=3, **options)
    resumed = fit(trained, space, trials=6, **options)
    assert [t.plan for t in resumed.result.trials] == [t.plan for t in whole.trials]
    assert [t.accuracy for t in resumed.result.trials] == [t.accuracy for t in whole.trials]
    assert eval_func()(resumed) == resumed.result.best.accuracy
    with pytest.raises(StorageError, match="space"):
        fit(trained, "int8", trials=6, **options)


MIXED_WIDTHS = OpConfig(
    weight=TensorScheme(format="int4", granularity=PerChannel(0)),
    inputs=TensorScheme(format="int8"),
    output=TensorScheme(format="fp16"),
)


def test_integers_in_and_fp16_out_on_one_op(trained: Reader, tmp_path: Path) -> None:
    others = Rule(options=[OpConfig.float()])
    space = SearchSpace(rules=[others, Rule(names=["head"], options=[MIXED_WIDTHS])])
    model = fit(trained, space, trials=1)
    x = digits().test_images[:32]
    seen = {}
    handle = trained.head.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    with torch.no_grad():
        trained(x)
    handle.remove()
    order = model.model.head._tuner_runtime.sites["head"].inputs[0]
    scale = np.float32(order.qparams.scale)
    features = seen["x"].numpy()
    features = np.clip(np.round(features / scale), -128, 127) * scale
    weight = trained.head.weight.detach().numpy()
    on = model.model.head.weight.detach().numpy()
    for row, found in zip(weight, on, strict=True):  # at most 16 values, none far from its own
        steps = found / np.abs(found)[found != 0].min()
        assert np.allclose(steps, np.round(steps), atol=1e-4)
        assert np.abs(np.round(steps)).max() <= 8
        assert np.corrcoef(row, found)[0, 1] > 0.98
    expected = features @ on.T + trained.head.bias.detach().numpy()
    with torch.no_grad():
        got = model(x).numpy()
    assert np.array_equal(got, got.astype(np.float16).astype(np.float32))
    assert np.allclose(got, expected, rtol=2**-11, atol=1e-5)
    assert model.result.op_table[-1].choice == "W4 A8 O16:fp16"
    again = quantization.load(model.save(tmp_path / "out"), Reader())
    assert Plan.from_json((tmp_path / "out" / "plan.json").read_text()) == model.plan
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_plan_may_carry_a_backward_format(trained: Reader) -> None:
    weight = TensorScheme(format="e4m3fn", backward_format="e5m2")
    space = SearchSpace(rules=[Rule(names=["head"], options=[OpConfig(weight=weight)])])
    model = fit(trained, space, trials=1)
    assert model.plan["head"].weight == weight
