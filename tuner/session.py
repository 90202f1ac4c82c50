"""The tuning loop: the strategy proposes, the plan is applied, evaluated and recorded."""

import hashlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

import strategies
from strategies.base import Outcome, Proposal
from strategies.replay import SearchRun
from strategies.space import Assignment
from tuner.config import TuningConfig
from tuner.costs import named_storage
from tuner.criteria import AccuracyGoal
from tuner.errors import EvaluationError, ExportError, PlanError, TuningCancelled
from tuner.evaluation import Evaluator
from tuner.evenly import evenly
from tuner.latency import is_faster
from tuner.plan import Plan
from tuner.plan_training import PlanTrainer, method_of, to_train
from tuner.preparation import Prepared
from tuner.progress import Progress
from tuner.quantized_model import QuantizedModel
from tuner.records import TrialRecord, storable
from tuner.results import StopReason
from tuner.storage import StudyStore

_log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
_HOPELESS = 0.25  # of the baseline: what training is not expected to make up for
IN_FULL = "trained in full: the plan"
Callback = Callable[[TrialRecord], object]


def judged(record: TrialRecord, goal: AccuracyGoal, baseline: TrialRecord) -> TrialRecord:
    """Judge a record, stored or new, by this goal; another metric may count than when it ran."""
    if record.state != "complete":
        return replace(record, meets_goal=False)
    accuracy = _accuracy(record, goal)
    return replace(record, accuracy=accuracy, meets_goal=_violation(record, goal, baseline) <= 0)


def _accuracy(record: TrialRecord, goal: AccuracyGoal) -> float:
    if goal.metric is None or not record.metrics:
        assert record.accuracy is not None
        return record.accuracy
    if goal.metric not in record.metrics:
        raise EvaluationError(
            f"the goal's metric is {goal.metric!r}, but trial {record.number} has "
            f"{', '.join(record.metrics)}: choose one of these, or another study_name"
        )
    return record.metrics[goal.metric]


def _violation(record: TrialRecord, goal: AccuracyGoal, baseline: TrialRecord) -> float:
    if record.state != "complete":
        return math.inf
    return goal.violation(_accuracy(record, goal), _accuracy(baseline, goal))


class Session:
    """One search over a prepared model. `records` grows as trials end, stored ones first."""

    def __init__(
        self,
        prepared: Prepared,
        config: TuningConfig,
        evaluate: Evaluator,
        store: StudyStore,
        baseline: TrialRecord,
        stored: Sequence[TrialRecord],
        callbacks: Iterable[Callback],
        progress: Progress,
        trainer: PlanTrainer | None = None,
    ) -> None:
        self.baseline = baseline
        self.stored_s = sum(record.duration_s for record in stored)
        self.records = [judged(record, config.goal, baseline) for record in stored]
        self._prepared = prepared
        self._config = config
        self._evaluate = evaluate
        self._store = store
        self._callbacks = tuple(callbacks)
        self._progress = progress
        self._trainer = trainer
        self._trained: dict[tuple[Plan, bool], QuantizedModel] = {}
        self._silent: set[str] = set()

    def run(self, deadline_s: float | None) -> StopReason:
        """Search until the strategy is done or the budget is spent; `deadline_s` is monotonic."""
        strategy = strategies.get(self._config.strategy)(
            self._prepared.space.space, self._config.seed
        )
        self._measure_stored(deadline_s)
        search = SearchRun(strategy, self._known())
        try:
            while True:
                if len(self.records) >= self._config.max_trials:
                    self._refuse_failures(self.records)
                    return "max_trials"
                if deadline_s is not None and time.monotonic() >= deadline_s:
                    return "timeout"
                proposal = search.next()
                if proposal is None:
                    self._refuse_failures(self.records)
                    self._train_misses(deadline_s)
                    return self._ended(strategy.exhaustive)
                search.tell(self._trial(proposal))
        except TuningCancelled:
            return "cancelled"

    def _train_misses(self, deadline_s: float | None) -> None:
        """Train plans that missed the goal and are cheaper than the best one: the last resort.

        From the cheapest to the dearest, it ends with the first that meets the goal, or after some
        attempts. Then the best plan, if it is trained, is trained in full.
        """
        if self._trainer is None:
            return
        for plan in evenly(self._misses(), self._trainer.training.attempts):
            if self._is_over(deadline_s):
                return
            before = self.best.number
            self._judge(to_train(plan), "trained, because it missed the goal")
            if self.best.number != before:
                break
        best = self.best
        is_done = any(r.plan == best.plan and r.reason.startswith(IN_FULL) for r in self.records)
        if method_of(best.plan) is None or is_done or self._is_over(deadline_s):
            return
        self._judge(best.plan, f"{IN_FULL} of trial {best.number}", full=True)

    def trained(self, record: TrialRecord) -> QuantizedModel | None:
        """Return the trained model of a record, None where its plan is not trained.

        That of a resumed study is trained again.
        """
        if self._trainer is None or method_of(record.plan) is None:
            return None
        key = record.plan, record.reason.startswith(IN_FULL)
        return self._trained.get(key) or self._model_of(*key)

    def _model_of(self, plan: Plan, full: bool) -> QuantizedModel:
        assert self._trainer is not None
        return self._trainer.trained(plan, self._trainer.training.epochs if full else None)

    def _is_over(self, deadline_s: float | None) -> bool:
        late = deadline_s is not None and time.monotonic() >= deadline_s
        return late or len(self.records) >= self._config.max_trials

    def _misses(self) -> list[Plan]:
        """Return plans worth training, the cheapest first: cheaper than the best, not hopeless."""
        known = {record.plan for record in self.records}
        goal, price = self._config.goal, self._cost(self.best)
        baseline = self.baseline.accuracy
        most = _HOPELESS * abs(baseline) if baseline else math.inf
        missed = [
            record
            for record in self.records
            if record.state == "complete"
            and self._cost(record) < price
            and 0 < _violation(record, goal, self.baseline) <= most
        ]
        missed.sort(key=self._cost)
        plans = dict.fromkeys(record.plan for record in missed if method_of(record.plan) is None)
        return [plan for plan in plans if to_train(plan) not in known]

    @property
    def best(self) -> TrialRecord:
        """The cheapest record that meets the goal; where none does, the one that misses least.

        Where latency is the objective, none counts that is not measured faster than FP32, unless
        it meets a goal that FP32 misses.
        """
        records = (self.baseline, *self.records)
        meeting = [record for record in records if record.meets_goal]
        if meeting:
            return min([r for r in meeting if self._may_win(r)] or meeting, key=self._rank)
        complete = (r for r in records if r.state == "complete" and self._may_win(r))
        return min(complete, key=lambda r: _violation(r, self._config.goal, self.baseline))

    def _may_win(self, record: TrialRecord) -> bool:
        if self._config.objective != "latency" or record.number == self.baseline.number:
            return True
        return is_faster(record.costs, self.baseline.costs)

    def _rank(self, record: TrialRecord) -> tuple[float, float, int]:
        """Order records that meet the goal: the cheapest first, of equal ones the most accurate."""
        margin = _violation(record, self._config.goal, self.baseline)
        return self._cost(record), margin, record.number

    def _cost(self, record: TrialRecord) -> float:
        """Return what a record costs in the objective: as predicted where it was not measured.

        It is inf where that is not known: of trained plans, and of another version's space.
        """
        space = self._prepared.space
        if self._config.cost_name in record.costs:
            return space.price(record.costs)
        try:
            return space.space.cost(space.assignment(record.plan))
        except PlanError:
            return math.inf

    def _ended(self, exhaustive: bool) -> StopReason:
        quantized = self.best.meets_goal and self.best.number > 0
        return "goal_met_and_minimal" if quantized and not exhaustive else "exhausted"

    def _known(self) -> dict[Assignment, Outcome]:
        known = {}
        for record in self.records:
            try:
                assignment = self._prepared.space.assignment(record.plan)
            except PlanError:  # of another version's space: it counts, but answers nothing
                continue
            known[assignment] = self._outcome(assignment, record)
        return known

    def _outcome(self, assignment: Assignment, record: TrialRecord) -> Outcome:
        violation = _violation(record, self._config.goal, self.baseline)
        space, measured = self._prepared.space, None
        if self._config.objective == "latency" and self._config.cost_name in record.costs:
            measured = space.price(record.costs)
        return Outcome(assignment, space.space.cost(assignment), violation, measured)

    def _trial(self, proposal: Proposal) -> Outcome:
        plan = self._prepared.space.plan(proposal.assignment)
        record = self._judge(plan, proposal.reason)
        return self._outcome(proposal.assignment, record)

    def _judge(self, plan: Plan, reason: str, full: bool = False) -> TrialRecord:
        """Evaluate a plan, store its record and tell of it."""
        record = self._run_plan(plan, reason, full)
        self._store.add(record.number, record.to_dict())
        self.records.append(record)
        self._progress.trial(record, self.best, self.baseline)
        for callback in self._callbacks:
            callback(record)
        if len(self.records) >= FAILURES_IN_A_ROW:
            self._refuse_failures(self.records[-FAILURES_IN_A_ROW:])
        return record

    def _run_plan(self, plan: Plan, reason: str, full: bool) -> TrialRecord:
        self._prepared.model.apply(plan)
        if method_of(plan) is None:
            attempt = self._evaluate.attempt(self._prepared.model.model)
            if attempt.error is None:
                self._tell_of_silent_ops()
        else:  # another model runs, and this one's ops count no calls
            attempt = self._evaluate.attempt_of(lambda: self._keep(plan, full))
        number = len(self.records) + 1
        costs = self._prepared.plan_costs(plan, measures=False)
        record = attempt.record(number, plan, reason, costs)
        return self._measured(judged(record, self._config.goal, self.baseline))

    def _measured(self, record: TrialRecord) -> TrialRecord:
        """Return a record of the plan that is on the model with what is measured of it.

        A plan that misses the goal is not measured: it cannot be what comes back. Neither can one
        that the target cannot run: that trial failed.
        """
        if not record.meets_goal:
            return record
        try:
            return replace(record, costs=self._prepared.plan_costs(record.plan))
        except ExportError:
            error = storable(traceback.format_exc())
            failed = replace(record, state="failed", accuracy=None, metrics={}, scores=None)
            return replace(failed, meets_goal=False, error=error)

    def _measure_stored(self, deadline_s: float | None) -> None:
        """Measure stored plans that meet the goal of today, and missed that of their time."""
        for index, record in enumerate(self.records):
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return
            if record.meets_goal and self._config.cost_name not in record.costs:
                self._prepared.model.apply(record.plan)
                self.records[index] = self._measured(record)

    def _keep(self, plan: Plan, full: bool) -> nn.Module:
        """Train a plan, and keep it beside the best so far."""
        model, best = self._model_of(plan, full), self.best.plan
        self._trained = {key: known for key, known in self._trained.items() if key[0] == best}
        self._trained[plan, full] = model
        return model.model

    def _tell_of_silent_ops(self) -> None:
        """Say which quantized ops `eval_func` never ran: their cost counts, their harm does not."""
        sites = self._prepared.model.runtime.sites.values()
        silent = {site.name for site in sites if not site.calls} - self._silent
        self._silent |= silent
        if silent:
            _log.warning(
                "eval_func never ran %d quantized ops, so the score says nothing of them: %s",
                len(silent),
                ", ".join(sorted(silent)),
            )

    def _refuse_failures(self, records: Sequence[TrialRecord]) -> None:
        """Raise with the first traceback where all of these trials failed."""
        if records and all(record.state == "failed" for record in records):
            first = records[0]
            raise EvaluationError(
                f"eval_func, or the timing of what passed it, failed on {len(records)} quantized "
                f"models in a row, though it works on FP32. The first failure, in trial "
                f"{first.number}:\n{first.error}"
            )


def model_signature(model: nn.Module) -> str:
    """Return a short hash of the model's class, and of its tensors' names, types and values."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in named_storage(model).items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"
