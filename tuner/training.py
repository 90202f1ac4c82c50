"""Training a model under its plan: fit_qat()."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor
from torch.optim import AdamW, Optimizer

from tuner.criteria import AccuracyGoal
from tuner.errors import DataError, TunerError, TuningCancelled
from tuner.evaluation import EvalFunc, Evaluator
from tuner.isolation import RandomState, isolated_random_state
from tuner.scores import Score
from tuner.tensors import map_tensors
from tuner.trainable_model import TrainableModel, parameter_groups
from tuner.training_progress import TrainingProgress
from tuner.training_result import EpochRecord, TrainingError, TrainingResult, TrainingStop

Loss = Callable[[Any, Any], Tensor]
TrainFunc = Callable[[Any], Any]
MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]


def fit_qat(
    model: TrainableModel,
    train: TrainFunc | tuple[Iterable[Any], Loss],
    epochs: int,
    eval_func: EvalFunc | None = None,
    *,
    goal: AccuracyGoal | None = None,
    optimizer: Optimizer | MakeOptimizer | None = None,
    lr: float = 1e-3,
    scale_lr: float | None = None,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a model under its plan, in place, and keep its best epoch.

    The best is that with the best `eval_func`, the untrained model among them; without `eval_func`
    the quantized epoch of the least loss. Then the model is in eval mode, and `to_quantized()`
    makes a QuantizedModel of it.

    Args:
        model: what prepare_qat() returned.
        train: `(train_dataloader, loss)`: batches as fit() takes them, read once in each epoch, and
            `loss(output, target)`, a 0-d tensor; the target is the last item of a tuple or list,
            else the whole batch. Or `train_func(model)`, which trains for one epoch with an
            optimizer of its own and may return the mean loss.
        epochs: how many, 1 or more.
        eval_func: takes an instance of the user's class, in eval mode, as in fit().
        goal: says which metric counts, and whether higher is better.
        optimizer: an optimizer of this model's parameters, or what makes one of parameter groups.
            Without it: AdamW. The learning rate of what is made here falls to 0 along a cosine.
        lr: of weights; `scale_lr` of learned scales, by default a tenth of it.
        weight_decay: of parameters with two axes and more.
        accumulate: so many batches add up their gradients for one step.
        progress: a live display; None shows it on a terminal only.

    Raises:
        TrainingError: the loss is NaN or infinite; the model is the best so far.
        DataError: there are no batches.
        TunerError: an argument cannot be used.
    """
    goal = AccuracyGoal() if goal is None else goal
    _check(model, train, epochs, eval_func, optimizer, accumulate)
    run = _Run(model, eval_func, goal, TrainingProgress(epochs, progress))
    if callable(train):
        return run.train(epochs, _Given(model, train))
    made = None if isinstance(optimizer, Optimizer) else (optimizer or AdamW)
    if made is not None:
        groups = parameter_groups(model, lr, scale_lr, weight_decay)
        optimizer = made(groups)
    assert isinstance(optimizer, Optimizer)
    loop = _Loop(model, train, optimizer, accumulate, run.progress)
    return run.train(epochs, loop if made is None else _Annealed(loop, epochs))


class _NotFinite(Exception):
    """The loss is no number."""

    def __init__(self, loss: float, where: str) -> None:
        super().__init__(loss, where)
        self.loss, self.where = loss, where


class _Given:
    """An epoch as the user's train_func runs it."""

    def __init__(self, model: TrainableModel, train_func: TrainFunc) -> None:
        self._model = model
        self._train_func = train_func

    def __call__(self, epoch: int) -> float | None:
        """Return the loss that train_func tells, if it does."""
        loss = self._train_func(self._model)
        if loss is None:
            return None
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(value):
            raise _NotFinite(value, "train_func returned")
        return value


class _Loop:
    """An epoch over a loader, with a loss and an optimizer; `schedule` is told how far it is."""

    def __init__(
        self,
        model: TrainableModel,
        train: tuple[Iterable[Any], Loss],
        optimizer: Optimizer,
        accumulate: int,
        progress: TrainingProgress,
    ) -> None:
        self._model = model
        self._loader, self._loss = train
        self.optimizer = optimizer
        self._accumulate = accumulate
        self._progress = progress
        self.schedule: Callable[[int, float], None] = lambda epoch, share: None

    def __call__(self, epoch: int) -> float:
        """Return the mean loss of an epoch's batches."""
        length = _length(self._loader)
        self._progress.epoch(epoch, length)
        losses: list[float] = []
        waiting = 0
        self.optimizer.zero_grad()
        for index, batch in enumerate(self._loader):
            self.schedule(epoch, index / length if length else 0.0)
            losses.append(self._backward(batch, f"batch {index} gave"))
            waiting += 1
            if waiting == self._accumulate:
                waiting = self._step()
            self._progress.advance()
        if waiting:
            self._step()
        if not losses:
            raise DataError(
                f"train_dataloader yielded no batch in epoch {epoch}: give a DataLoader or a list; "
                "an iterator that was read before yields nothing more"
            )
        return math.fsum(losses) / len(losses)

    def _backward(self, batch: Any, where: str) -> float:
        output = self._model.feed(batch)
        loss = self._loss(output, _target(batch, self._model))
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TunerError(
                f"loss returned {_described(loss)}: it must return a tensor of one element that "
                "depends on the model's output"
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _NotFinite(value, where)
        (loss / self._accumulate).sum().backward()
        return value

    def _step(self) -> int:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 0


class _Annealed:
    """A loop whose learning rates fall from their first values to 0 along half a cosine."""

    def __init__(self, loop: _Loop, epochs: int) -> None:
        self._loop = loop
        self._epochs = epochs
        self._first = [group["lr"] for group in loop.optimizer.param_groups]
        loop.schedule = self._set

    def __call__(self, epoch: int) -> float:
        """Return the mean loss of an epoch."""
        return self._loop(epoch)

    def _set(self, epoch: int, share: float) -> None:
        done = (epoch - 1 + share) / self._epochs
        factor = 0.5 * (1 + math.cos(math.pi * done))
        for group, first in zip(self._loop.optimizer.param_groups, self._first, strict=True):
            group["lr"] = first * factor


class _Run:
    """One call of fit_qat(): epochs, evaluations, and the best state so far."""

    def __init__(
        self,
        model: TrainableModel,
        eval_func: EvalFunc | None,
        goal: AccuracyGoal,
        progress: TrainingProgress,
    ) -> None:
        self.progress = progress
        self._model = model
        self._goal = goal
        self._evaluate = None
        if eval_func is not None:
            self._evaluate = Evaluator(eval_func, goal.metric, RandomState.now())
        self._epochs: list[EpochRecord] = []
        self._before: float | None = None
        self._best = EpochRecord(0, None, None, True, 0.0)
        self._state = _snapshot(model)
        self._started_s = time.monotonic()
        self._first_step = int(model.steps)

    def train(self, epochs: int, epoch: Callable[[int], float | None]) -> TrainingResult:
        """Train, and put the best state on the model, whatever happens."""
        try:
            with self.progress:
                self._look_before()
                for number in range(1, epochs + 1):
                    self._one(number, epoch)
            return self._result("all_epochs")
        except TuningCancelled:
            return self._result("cancelled")
        except _NotFinite as error:
            raise TrainingError(
                f"epoch {len(self._epochs) + 1}: {error.where} the loss {error.loss}. The model is "
                f"as it was after epoch {self._best.number}. Lower lr or scale_lr",
                self._result("loss_not_finite"),
            ) from None
        except KeyboardInterrupt as interrupt:
            interrupt.training_result = self._result("interrupted")  # type: ignore[attr-defined]
            raise
        finally:
            self._model.load_state_dict(self._state)
            self._model.accuracy = self._best.accuracy
            self._model.eval()

    def _look_before(self) -> None:
        if self._evaluate is not None and self._model.is_ready:
            self._before = self._score().accuracy
            self._best = EpochRecord(0, None, self._before, True, 0.0)
            self.progress.result(f"before training: accuracy {self._before:.5g}")

    def _one(self, number: int, epoch: Callable[[int], float | None]) -> None:
        started_s = time.monotonic()
        quantized = self._model.is_quantizing
        self._model.train()
        loss = epoch(number)
        score = None if self._evaluate is None else self._score()
        record = EpochRecord(
            number,
            loss,
            None if score is None else score.accuracy,
            quantized,
            time.monotonic() - started_s,
            {} if score is None else dict(score.metrics),
        )
        self._epochs.append(record)
        self.progress.result(_line(record))
        if self._beats(record):
            self._best, self._state = record, _snapshot(self._model)

    def _score(self) -> Score:
        assert self._evaluate is not None
        with isolated_random_state():  # else each epoch would shuffle as the one before
            return self._evaluate(self._model.model)

    def _beats(self, record: EpochRecord) -> bool:
        """Return whether an epoch is better than the best: of equal ones the later counts."""
        best = self._best
        if record.accuracy is not None:
            return best.accuracy is None or not self._goal.better(best.accuracy, record.accuracy)
        if record.loss is None or best.loss is None:
            return True
        if record.quantized != best.quantized:
            return record.quantized
        return record.loss <= best.loss

    def _result(self, reason: TrainingStop) -> TrainingResult:
        return TrainingResult(
            accuracy_before=self._before,
            accuracy_after=self._best.accuracy,
            best_epoch=self._best.number,
            epochs=tuple(self._epochs),
            stop_reason=reason,
            steps=int(self._model.steps) - self._first_step,
            duration_s=time.monotonic() - self._started_s,
        )


def _snapshot(model: TrainableModel) -> dict[str, Any]:
    return map_tensors(lambda t: t.detach().clone(), dict(model.state_dict()))  # type: ignore[no-any-return]


def _length(loader: Iterable[Any]) -> int | None:
    """Return how many batches there will be; a DataLoader of a stream refuses to tell."""
    try:
        return len(cast(Any, loader))
    except TypeError:
        return None


def _target(batch: Any, model: TrainableModel) -> Any:
    target = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else batch
    device = next(model.model.parameters()).device
    return map_tensors(lambda t: t.to(device), target)


def _line(record: EpochRecord) -> str:
    text = f"epoch {record.number}"
    text += "" if record.loss is None else f"  loss {record.loss:.5g}"
    return text + ("" if record.accuracy is None else f"  accuracy {record.accuracy:.5g}")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, requires_grad={value.requires_grad}"
    return f"a {type(value).__name__}"


def can_train(train: object) -> bool:
    """Return whether this is a function, or a loader and a loss."""
    if isinstance(train, tuple | list) and len(train) == 2:
        return isinstance(train[0], Iterable) and callable(train[1])
    return callable(train)


def _check(
    model: object,
    train: object,
    epochs: object,
    eval_func: object,
    optimizer: object,
    accumulate: object,
) -> None:
    """Refuse arguments of wrong types."""
    if not isinstance(model, TrainableModel):
        raise TunerError(
            f"model is a {type(model).__name__}: give what prepare_qat() returned, a TrainableModel"
        )
    if not can_train(train):
        raise TunerError(
            f"train is a {type(train).__name__}: give (train_dataloader, loss), or a function that "
            "trains the model for one epoch"
        )
    for name, given in (("eval_func", eval_func), ("optimizer", optimizer)):
        if given is not None and not callable(given) and not isinstance(given, Optimizer):
            raise TunerError(f"{name} is a {type(given).__name__}: give a function")
    for name, value in (("epochs", epochs), ("accumulate", accumulate)):
        if type(value) is not int or value < 1:
            raise TunerError(f"{name} is {value!r}: give a whole number, 1 or more")
