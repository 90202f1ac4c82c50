"""One evaluation: the user's `eval_func` under equal conditions, and what it gave."""

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.errors import EvaluationError, TuningCancelled
from tuner.isolation import RandomState
from tuner.plan import Plan
from tuner.records import TrialRecord, storable
from tuner.scores import Score, read_score

EvalFunc = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Calls the user's `eval_func` under equal conditions: eval mode, the same random state."""

    eval_func: EvalFunc
    metric: str | None
    random_state: RandomState

    def __call__(self, model: nn.Module) -> Score:
        """Return the score of the model as it is."""
        model.eval()
        self.random_state.restore()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        values = {name: (p, p.data) for name, p in model.named_parameters(remove_duplicate=False)}
        try:
            value = self.eval_func(model)
        finally:  # what eval_func raised, Ctrl-C too, goes on as it is
            has_other_types = _restore_types(model, values)
            _restore_buffers(model, before)
            model.eval()
        if has_other_types:
            raise EvaluationError(
                "eval_func changed the type of the model's parameters: it must leave the model "
                "as it is (work on a copy)"
            )
        return read_score(value, self.metric)

    def attempt(self, model: nn.Module) -> "Attempt":
        """Return what an evaluation gives; only TuningCancelled, and no exception, goes on."""
        return self.attempt_of(lambda: model)

    def attempt_of(self, make: Callable[[], nn.Module]) -> "Attempt":
        """Return what the evaluation of a model that must be made first gives."""
        started, score, error = time.perf_counter(), Score(float("nan")), None
        try:
            score = self(make())
        except TuningCancelled:
            raise
        except Exception:  # the user's eval_func may raise anything: it is this trial's failure
            error = storable(traceback.format_exc())
        return Attempt(score, time.perf_counter() - started, error)


@dataclass(frozen=True, eq=False)
class Attempt:
    """What an evaluation gave: a score, or the traceback of what `eval_func` raised."""

    score: Score
    duration_s: float
    error: str | None = None

    def record(
        self,
        number: int,
        plan: Plan,
        reason: str,
        costs: Mapping[str, float],
        meets_goal: bool | None = False,
    ) -> TrialRecord:
        """Return the record of the trial that this was."""
        failed = self.error is not None
        return TrialRecord(
            number=number,
            plan=plan,
            accuracy=None if failed else self.score.accuracy,
            metrics={storable(name): value for name, value in self.score.metrics.items()},
            costs=costs,
            meets_goal=meets_goal,
            state="failed" if failed else "complete",
            duration_s=self.duration_s,
            reason=reason,
            error=self.error,
            scores=self.score.samples,
        )


def _restore_types(model: nn.Module, before: Mapping[str, tuple[nn.Parameter, Tensor]]) -> bool:
    """Put parameters of another type back as they were; return whether there were any."""
    now = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    types = {name: value.dtype for name, (_, value) in before.items()}
    for name, (parameter, value) in before.items():
        if now.get(name, types[name]) != types[name]:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, parameter)
            parameter.data = value
    return now != types


def _restore_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Take back what an evaluation did to running statistics and the like."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            kept = before.get(name)
            if kept is not None and kept.shape == buffer.shape:
                if buffer.dtype != kept.dtype:
                    buffer.data = buffer.to(kept.dtype)
                buffer.copy_(kept)


def evaluate_baseline(
    evaluate: Evaluator, model: nn.Module, costs: dict[str, float]
) -> TrialRecord:
    """Evaluate the FP32 model; what `eval_func` raises is raised as it is."""
    started = time.perf_counter()
    attempt = Attempt(evaluate(model), time.perf_counter() - started)
    return attempt.record(0, Plan({}), "FP32 baseline", costs, meets_goal=None)
