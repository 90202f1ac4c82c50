"""The tuning loop: the strategy proposes, the plan is applied, evaluated and recorded."""

import hashlib
import logging
import time
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
from tuner.errors import EvaluationError, PlanError, TuningCancelled
from tuner.evaluation import Evaluator
from tuner.plan import Plan
from tuner.preparation import Prepared
from tuner.progress import Progress
from tuner.records import TrialRecord
from tuner.results import StopReason
from tuner.storage import StudyStore

_log = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3
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
        return float("inf")
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
        self._silent: set[str] = set()

    def run(self, deadline_s: float | None) -> StopReason:
        """Search until the strategy is done or the budget is spent; `deadline_s` is monotonic."""
        strategy = strategies.get(self._config.strategy)(
            self._prepared.space.space, self._config.seed
        )
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
                    return self._ended(strategy.exhaustive)
                search.tell(self._trial(proposal))
        except TuningCancelled:
            return "cancelled"

    @property
    def best(self) -> TrialRecord:
        """The cheapest record that meets the goal; where none does, the one that misses least."""
        meeting = [r for r in (self.baseline, *self.records) if r.meets_goal]
        if meeting:
            return min(meeting, key=lambda record: (self._cost(record), record.number))
        complete = [r for r in (self.baseline, *self.records) if r.state == "complete"]
        return min(complete, key=lambda r: _violation(r, self._config.goal, self.baseline))

    def _cost(self, record: TrialRecord) -> float:
        return self._prepared.space.price(record.costs)

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
        return Outcome(assignment, self._prepared.space.space.cost(assignment), violation)

    def _trial(self, proposal: Proposal) -> Outcome:
        plan = self._prepared.space.plan(proposal.assignment)
        record = judged(self._run_plan(plan, proposal.reason), self._config.goal, self.baseline)
        self._store.add(record.number, record.to_dict())
        self.records.append(record)
        self._progress.trial(record, self.best, self.baseline)
        for callback in self._callbacks:
            callback(record)
        if len(self.records) >= FAILURES_IN_A_ROW:
            self._refuse_failures(self.records[-FAILURES_IN_A_ROW:])
        return self._outcome(proposal.assignment, record)

    def _run_plan(self, plan: Plan, reason: str) -> TrialRecord:
        self._prepared.model.apply(plan)
        attempt = self._evaluate.attempt(self._prepared.model.model)
        if attempt.error is None:
            self._tell_of_silent_ops()
        costs = self._prepared.costs.costs(plan).to_dict()
        return attempt.record(len(self.records) + 1, plan, reason, costs)

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
                f"eval_func failed on {len(records)} quantized models in a row, though it works "
                f"on FP32. The first failure, in trial {first.number}:\n{first.error}"
            )


def model_signature(model: nn.Module) -> str:
    """Return a short hash of the model's class, and of its tensors' names, types and values."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in named_storage(model).items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return f"{type(model).__name__} {digest.hexdigest()[:16]}"
