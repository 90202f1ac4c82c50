"""fit_qat(): epochs, the best of them, accumulation, what ends a run, and what it reports."""

import copy
import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.tuner.training.tasks import METHODS, Perceptron, batches, prepared
from tuner import AccuracyGoal, TuningCancelled, quantization
from tuner.errors import DataError, SaveError, TunerError
from tuner.trainable_model import TrainableModel, parameter_groups
from tuner.training import fit_qat
from tuner.training_progress import TrainingProgress
from tuner.training_result import TrainingError, TrainingResult


def labelled(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Return batches whose labels a perceptron can learn."""
    pairs = []
    for x in batches(count, samples=16):
        pairs.append((x, x[:, :3].argmax(-1)))
    return pairs


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        hits = [float((model(x).argmax(-1) == y).float().mean()) for x, y in labelled(8)]
    return sum(hits) / len(hits)


def model_for(method: str = "qat", **options: Any) -> TrainableModel:
    torch.manual_seed(3)
    return prepared(Perceptron(), [x for x, _ in labelled()], method=method, **options)


class Scores:
    """An eval_func that gives these scores one after the other, and keeps the weights it saw."""

    def __init__(self, *scores: float) -> None:
        self.left = list(scores)
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module) -> float:
        assert isinstance(model, Perceptron)
        assert not model.training
        self.seen.append(copy.deepcopy(model.state_dict()))
        return self.left.pop(0)


class TestTraining:
    @pytest.mark.parametrize("method", METHODS)
    def test_makes_a_quantized_model_better(self, method: str) -> None:
        model = model_for(method)
        result = fit_qat(model, (labelled(), F.cross_entropy), 12, accuracy, lr=2e-2)
        assert result.accuracy_before is not None
        assert result.accuracy_after is not None
        assert result.accuracy_after > max(0.8, result.accuracy_before)
        assert result.steps == 12 * 6
        assert len(result.losses) == 12
        losses = [loss for loss in result.losses if loss is not None]
        assert losses[-1] < losses[0]
        assert not model.training
        frozen = model.to_quantized()
        assert accuracy(frozen.model) == result.accuracy_after
        assert frozen.result.best.accuracy == result.accuracy_after

    def test_the_accuracy_after_training_is_judged_by_the_goal_of_the_search(self) -> None:
        torch.manual_seed(3)
        net = Perceptron()
        fitted = quantization.fit(net, [x for x, _ in labelled()], accuracy, progress=False)
        model = quantization.prepare_qat(fitted)
        quantization.fit_qat(model, (labelled(), F.cross_entropy), 12, accuracy, lr=2e-2)
        frozen = model.to_quantized()
        assert frozen.result.goal_met is True
        assert frozen.result.baseline == fitted.result.baseline
        assert frozen.result.best.accuracy == accuracy(frozen.model)

    def test_gradients_of_batches_add_up(self) -> None:
        steps: dict[int, dict[str, Tensor]] = {}
        pairs = labelled(2)
        whole = [tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))]
        for accumulate, data in ((2, pairs), (1, whole)):
            model = model_for(weights=None, inputs="int16")
            groups = parameter_groups(model, 0.1)
            result = fit_qat(
                model,
                (data, F.cross_entropy),
                1,
                optimizer=torch.optim.SGD(groups),
                accumulate=accumulate,
            )
            assert result.steps == 1
            steps[accumulate] = {n: p.detach() for n, p in model.model.named_parameters()}
        for name, parameter in steps[1].items():
            torch.testing.assert_close(steps[2][name], parameter, rtol=1e-3, atol=1e-4)

    def test_what_is_left_of_an_epoch_makes_a_step_too(self) -> None:
        model = model_for()
        result = fit_qat(model, (labelled(5), F.cross_entropy), 2, accumulate=2)
        assert result.steps == 2 * 3

    def test_the_learning_rate_falls_along_a_cosine(self) -> None:
        seen: list[list[float]] = []

        def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(groups)
            optimizer.register_step_pre_hook(
                lambda o, a, k: seen.append([g["lr"] for g in o.param_groups])
            )
            return optimizer

        fit_qat(model_for("lsq"), (labelled(4), F.cross_entropy), 2, optimizer=make, lr=0.4)
        factors = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
        assert [rates[0] for rates in seen] == pytest.approx([0.4 * f for f in factors])
        assert [rates[-1] for rates in seen] == pytest.approx([0.04 * f for f in factors])

    def test_a_function_trains_an_epoch_its_own_way(self) -> None:
        model = model_for("lsq")
        optimizer = torch.optim.Adam(parameter_groups(model, 1e-2))
        modes: list[bool] = []

        def train_func(given: TrainableModel) -> Tensor:
            assert given is model
            modes.append(given.training)
            for x, y in labelled(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(given(x), y)
                loss.backward()
                optimizer.step()
            return loss

        result = fit_qat(model, train_func, 4, accuracy)
        assert modes == [True] * 4
        assert result.steps == 12
        assert all(loss is not None for loss in result.losses)

    def test_a_data_loader_shuffles_anew_in_each_epoch_and_evaluation_does_not_disturb(
        self,
    ) -> None:
        x = torch.cat([x for x, _ in labelled()])
        y = torch.cat([y for _, y in labelled()])
        orders: dict[bool, list[Tensor]] = {}
        for evaluated in (False, True):
            torch.manual_seed(5)
            seen: list[Tensor] = []

            def loss(output: Tensor, target: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(target)
                return F.cross_entropy(output, target)

            loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
            model = prepared(Perceptron(), [x])
            torch.manual_seed(6)
            fit_qat(model, (loader, loss), 2, accuracy if evaluated else None)
            orders[evaluated] = seen
        assert not torch.equal(torch.cat(orders[True][:3]), torch.cat(orders[True][3:]))
        assert all(map(torch.equal, orders[False], orders[True]))


class TestBest:
    @pytest.mark.parametrize(
        ("scores", "higher", "best"),
        [
            ((0.5, 0.7, 0.9, 0.6), True, 2),
            ((0.5, 0.7, 0.9, 0.6), False, 0),
            ((0.9, 0.1, 0.2, 0.3), True, 0),
            ((0.5, 0.8, 0.8, 0.6), True, 2),
        ],
    )
    def test_epoch_by_eval_func_is_kept(
        self, scores: tuple[float, ...], higher: bool, best: int
    ) -> None:
        model, evaluate = model_for(), Scores(*scores)
        goal = AccuracyGoal(higher_is_better=higher)
        result = fit_qat(model, (labelled(), F.cross_entropy), 3, evaluate, goal=goal)
        assert result.best_epoch == best
        assert (result.accuracy_before, result.accuracy_after) == (scores[0], scores[best])
        kept = model.model.state_dict()
        assert all(torch.equal(kept[n], value) for n, value in evaluate.seen[best].items())

    def test_epoch_by_loss_is_kept_where_nothing_evaluates(self) -> None:
        losses = iter((0.7, 0.3, 0.5))
        model = model_for()
        states = []

        def train_func(given: TrainableModel) -> float:
            with torch.no_grad():
                next(given.model.parameters()).add_(1.0)
            states.append(next(given.model.parameters()).detach().clone())
            return next(losses)

        result = fit_qat(model, train_func, 3)
        assert result.best_epoch == 2
        assert torch.equal(next(model.model.parameters()), states[1])

    def test_epoch_of_the_warm_up_is_not_the_best_by_its_loss(self) -> None:
        model = model_for(quant_start_step=4)
        losses = iter((0.1, 0.9, 0.8, 0.85))

        def train_func(given: TrainableModel) -> float:
            for _ in range(2):
                given(batches()[0])
                given.count_step()
            return next(losses)

        result = fit_qat(model, train_func, 4)
        assert [epoch.quantized for epoch in result.epochs] == [False, False, True, True]
        assert result.best_epoch == 3

    def test_last_epoch_is_kept_where_nobody_tells_a_loss(self) -> None:
        assert fit_qat(model_for(), lambda model: None, 3).best_epoch == 3

    def test_metric_of_the_goal_counts(self) -> None:
        values = iter((0.1, 0.2, 0.05))

        def evaluate(model: nn.Module) -> dict[str, float]:
            return {"accuracy": 0.5, "error": next(values)}

        goal = AccuracyGoal(metric="error", higher_is_better=False)
        result = fit_qat(model_for(), (labelled(), F.cross_entropy), 2, evaluate, goal=goal)
        assert (result.best_epoch, result.accuracy_after) == (2, 0.05)
        assert result.epochs[0].metrics == {"accuracy": 0.5, "error": 0.2}


class TestEnds:
    def test_a_loss_that_is_no_number_names_the_epoch_and_keeps_the_best(self) -> None:
        model, evaluate = model_for(), Scores(0.5, 0.8, 0.6)
        calls = iter(range(100))

        def loss(output: Tensor, target: Tensor) -> Tensor:
            factor = math.nan if next(calls) == 14 else 1.0
            return F.cross_entropy(output, target) * factor

        with pytest.raises(TrainingError, match=r"epoch 3: batch 2 gave the loss nan") as caught:
            fit_qat(model, (labelled(), loss), 5, evaluate)
        result = caught.value.result
        assert result is not None
        assert (result.best_epoch, result.accuracy_after, len(result.epochs)) == (1, 0.8, 2)
        assert result.stop_reason == "loss_not_finite"
        kept = model.model.state_dict()
        assert all(torch.equal(kept[n], value) for n, value in evaluate.seen[1].items())
        assert all(torch.isfinite(p).all() for p in model.parameters())

    def test_a_function_that_returns_nan_ends_it_too(self) -> None:
        with pytest.raises(TrainingError, match="epoch 1: train_func returned the loss nan"):
            fit_qat(model_for(), lambda model: math.nan, 2)

    def test_cancelling_returns_the_best_so_far(self) -> None:
        evaluate: Callable[[nn.Module], float] = Scores(0.5, 0.8)

        def until_empty(model: nn.Module) -> float:
            if not evaluate.left:  # type: ignore[attr-defined]
                raise TuningCancelled("enough")
            return evaluate(model)

        result = fit_qat(model_for(), (labelled(), F.cross_entropy), 9, until_empty)
        assert (result.stop_reason, result.best_epoch) == ("cancelled", 1)

    def test_ctrl_c_goes_on_with_the_result(self) -> None:
        model = model_for()

        def train_func(given: TrainableModel) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught:
            fit_qat(model, train_func, 2, accuracy)
        assert caught.value.training_result.stop_reason == "interrupted"  # type: ignore[attr-defined]
        assert not model.training


class TestMistakes:
    def test_wrong_types(self) -> None:
        model = model_for()
        good = (labelled(), F.cross_entropy)
        with pytest.raises(TunerError, match=r"model is a Perceptron: give what prepare_qat"):
            fit_qat(Perceptron(), good, 1)  # type: ignore[arg-type]
        with pytest.raises(TunerError, match=r"train is a list: give \(train_dataloader, loss\)"):
            fit_qat(model, labelled(), 1)  # type: ignore[arg-type]
        with pytest.raises(TunerError, match="epochs is 0"):
            fit_qat(model, good, 0)
        with pytest.raises(TunerError, match=r"accumulate is 1\.5"):
            fit_qat(model, good, 1, accumulate=1.5)  # type: ignore[arg-type]
        with pytest.raises(TunerError, match="eval_func is a float"):
            fit_qat(model, good, 1, 0.5)  # type: ignore[arg-type]
        with pytest.raises(TunerError, match="optimizer is a str"):
            fit_qat(model, good, 1, optimizer="adam")  # type: ignore[arg-type]

    def test_an_empty_loader(self) -> None:
        with pytest.raises(DataError, match="no batch in epoch 1"):
            fit_qat(model_for(), ([], F.cross_entropy), 2)
        with pytest.raises(DataError, match="no batch in epoch 2"):
            fit_qat(model_for(), (iter(labelled()), F.cross_entropy), 2)

    @pytest.mark.parametrize(
        ("loss", "what"),
        [
            (lambda output, target: 0.5, "a float"),
            (lambda output, target: output, r"shape \[16, 3\]"),
            (lambda output, target: output.detach().sum(), "requires_grad=False"),
        ],
    )
    def test_a_loss_that_is_none(self, loss: Any, what: str) -> None:
        with pytest.raises(TunerError, match=f"loss returned .*{what}"):
            fit_qat(model_for(), (labelled(), loss), 1)


class TestReport:
    def test_result_comes_back_from_json(self) -> None:
        result = fit_qat(model_for(), (labelled(), F.cross_entropy), 2, accuracy)
        text = json.dumps(result.to_dict(), allow_nan=False)
        assert TrainingResult.from_dict(json.loads(text)) == result
        with pytest.raises(SaveError, match="version 7"):
            TrainingResult.from_dict({"version": 7})
        assert f"{result.accuracy_after:.5g} after" in result.summary()

    def test_progress_is_plain_lines_without_a_terminal_and_nothing_when_off(self) -> None:
        for enabled, lines in ((True, ["before", "epoch 1"]), (False, []), (None, [])):
            text = io.StringIO()
            with TrainingProgress(2, enabled, Console(file=text)) as progress:
                progress.result("before")
                progress.epoch(1, 3)
                progress.advance()
                progress.result("epoch 1")
            assert text.getvalue().split("\n")[:-1] == lines

    def test_progress_on_a_terminal_counts_epochs_and_batches(self) -> None:
        text = io.StringIO()
        console = Console(file=text, force_terminal=True, width=80)
        with TrainingProgress(4, None, console) as progress:
            progress.epoch(2, 3)
            progress.result("epoch 1  loss 0.5")
        assert "2/4" in text.getvalue()
        assert "0/3" in text.getvalue()
        assert "loss 0.5" in text.getvalue()
