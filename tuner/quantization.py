"""The face of the library: fit(), load(), simulate() and sweep()."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tuner.config import TuningConfig
from tuner.errors import TunerError, UnsupportedError
from tuner.evaluation import EvalFunc, Evaluator, evaluate_baseline
from tuner.isolation import RandomState, copied, isolated_random_state
from tuner.latency import is_faster
from tuner.nothing_quantized import warn_if_nothing_quantized
from tuner.op_table import op_table
from tuner.plan import Plan
from tuner.plan_training import PlanTrainer, Training, method_of
from tuner.preparation import Preparation, Prepared
from tuner.progress import Progress
from tuner.quantized_model import QuantizedModel
from tuner.records import TrialRecord
from tuner.results import StopReason, TuningResult
from tuner.saving import Parts, load_parts
from tuner.schemes import OpConfig
from tuner.session import Callback, Session, judged, model_signature
from tuner.simulate import simulate
from tuner.storage import Storage, StudyHeader, StudyStore
from tuner.sweep import sweep
from tuner.trainable_model import TrainableModel, parameter_groups
from tuner.trainable_preparation import prepare_qat
from tuner.training import Loss, TrainFunc, fit_qat

__all__ = [
    "TrainableModel",
    "Training",
    "fit",
    "fit_qat",
    "load",
    "parameter_groups",
    "prepare_qat",
    "simulate",
    "sweep",
]


def fit(
    model: nn.Module,
    calib_dataloader: Iterable[Any],
    eval_func: EvalFunc | None = None,
    config: TuningConfig | None = None,
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    train_func: TrainFunc | tuple[Iterable[Any], Loss] | Training | None = None,
    storage: str | Storage | None = None,
    study_name: str | None = None,
    executor: None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool | Progress | None = None,
) -> QuantizedModel:
    """Find the cheapest plan that meets the accuracy goal, and return the model with it on.

    Args:
        model: the FP32 (or bf16, fp16) model; it is copied once and never changed.
        calib_dataloader: any iterable of batches (a tensor, `(inputs, labels)`, a mapping, a tuple
            of inputs), read once.
        eval_func: takes an instance of the model's own class; returns a number, a mapping of
            metrics, or a 1-d array of per-sample scores. Without it the model is quantized by
            calibration alone.
        config: the goal, the space, the strategy and the budget.
        forward: `forward(model, batch)` calls the model on a batch, where the default cannot.
        train_func: trains the model that it gets for one epoch, or `(train_dataloader, loss)`, or a
            `quantization.Training` with more to say. Plans whose options have `recovery=("qat",)`
            or `("lsq",)` are then trained before they are judged; other plans that missed the goal
            are trained when the search is over, and what is returned is trained in full.
        storage: `sqlite:///path` or `postgresql://…` keeps each trial as it ends.
        study_name: names the study in the storage; the same name resumes it.
        callbacks: each is called with every TrialRecord as its trial ends, and may raise
            TuningCancelled to stop the search.
        progress: a live display; None shows it on a terminal only. A tuner.progress.Progress of
            your own is told of every phase.

    Raises:
        TunerError: the model, the data, the space, the storage or a score cannot be used.
        Exception: whatever `eval_func` raises on the FP32 model, as it is.
        KeyboardInterrupt: Ctrl-C; `tuning_result` holds the trials so far, None before the search.
    """
    config = TuningConfig() if config is None else config
    if callable(callbacks):
        raise TunerError("callbacks is a function: give a list of functions, callbacks=[…]")
    callbacks = tuple(callbacks)
    _refuse(config, executor, eval_func, forward, callbacks, storage, study_name)
    started = time.monotonic()
    shown = progress if isinstance(progress, Progress) else Progress(progress, config.cost_name)
    with _interruptible(), isolated_random_state() as random_state, shown as bar:
        twin = copied(model)
        training = None if train_func is None else Training.of(train_func)
        trains = training is not None
        preparation = Preparation(twin, calib_dataloader, forward, config, trains)
        bar.start(config.goal.describe(), config.max_trials)
        bar.phase("recording", None)
        preparation.record()
        if eval_func is None:
            return _by_calibration(preparation, config, bar, started, training, random_state)
        run = _Run(preparation, config, bar, started, training)
        return run.tuned(model, eval_func, random_state, (storage, study_name), callbacks)


def load(directory: str | Path, model: nn.Module) -> QuantizedModel:
    """Read what QuantizedModel.save() wrote, into a copy of `model` (its weights do not matter).

    Raises SaveError for a damaged directory, PlanError for a model of another architecture.
    """
    return QuantizedModel(load_parts(directory, model))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Give an interrupt that comes before the search the same attribute as one that comes later."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not hasattr(interrupt, "tuning_result"):
            interrupt.tuning_result = None  # type: ignore[attr-defined]
        raise


class _Run:
    """One call of fit() with an eval_func."""

    def __init__(
        self,
        preparation: Preparation,
        config: TuningConfig,
        bar: Progress,
        started: float,
        training: Training | None,
    ) -> None:
        self._preparation = preparation
        self._config = config
        self._bar = bar
        self._started = started
        self._training = training

    def tuned(
        self,
        model: nn.Module,
        eval_func: EvalFunc,
        random_state: RandomState,
        place: tuple[str | Storage | None, str | None],
        callbacks: Iterable[Callback],
    ) -> QuantizedModel:
        space = hashlib.sha256(self._preparation.signature().encode()).hexdigest()[:16]
        header = StudyHeader(
            model=model_signature(model),
            space=f"{self._config.search_space.preset} for {self._config.objective} {space}",
            strategy=self._config.strategy,
            seed=self._config.seed,
            versions=self._preparation.measured_with(),
        )
        store = StudyStore.open(*place, header)
        evaluate = Evaluator(eval_func, self._config.goal.metric, random_state)
        try:
            return self._searched(store, evaluate, callbacks)
        finally:
            store.close()

    def _searched(
        self, store: StudyStore, evaluate: Evaluator, callbacks: Iterable[Callback]
    ) -> QuantizedModel:
        stored = [TrialRecord.from_dict(record) for record in store.records()]
        baseline = stored[0] if stored else self._baseline(store, evaluate)
        known = store.payload
        self._preparation.anchor(baseline, self._bar)
        prepared = self._preparation.finish(self._bar, known or None)
        payload = prepared.payload | {"goal": self._config.goal.model_dump(mode="json")}
        if payload != known:
            store.set_payload(payload)
        baseline = _with_goal(baseline, prepared, self._config)
        self._bar.start(self._config.goal.describe(baseline.accuracy), self._config.max_trials)
        trainer = _trainer(prepared, self._config, self._training, evaluate.random_state)
        known_trials = stored[1:]
        session = Session(
            prepared,
            self._config,
            evaluate,
            store,
            baseline,
            known_trials,
            callbacks,
            self._bar,
            trainer,
        )
        limit = self._config.timeout_s
        deadline_s = None if limit is None else self._started + limit
        try:
            reason = session.run(deadline_s)
        except KeyboardInterrupt as interrupt:
            interrupt.tuning_result = self._result(session, prepared, "cancelled")  # type: ignore[attr-defined]
            raise
        result = self._result(session, prepared, reason)
        warn_if_nothing_quantized(result, stacklevel=4)
        return _finished(prepared, result, session.trained(result.best))

    def _baseline(self, store: StudyStore, evaluate: Evaluator) -> TrialRecord:
        self._bar.phase("evaluating FP32", None)
        costs = self._preparation.baseline_costs(self._bar)
        baseline = evaluate_baseline(evaluate, self._preparation.model.model, costs)
        store.add(0, baseline.to_dict())
        return baseline

    def _result(self, session: Session, prepared: Prepared, reason: StopReason) -> TuningResult:
        best = session.best
        return TuningResult(
            config=self._config,
            baseline_trial=session.baseline,
            best=best,
            trials=tuple(session.records),
            stop_reason=reason,
            evaluations=1 + len(session.records),
            op_table=_op_table(prepared, best.plan, self._config),
            uncovered=prepared.graph.uncovered,
            unreached=prepared.graph.unreached,
            duration_s=time.monotonic() - self._started + session.stored_s,
            eval_s=session.baseline.duration_s + sum(r.duration_s for r in session.records),
        )


def _trainer(
    prepared: Prepared, config: TuningConfig, training: Training | None, random_state: RandomState
) -> PlanTrainer | None:
    if training is None:
        return None

    def parts_of(plan: Plan) -> Parts:
        unknown = _unjudged(1, plan, {}, "in training")
        return _parts(prepared, plan, _result_of(prepared, config, unknown, unknown))

    return PlanTrainer(training, random_state, parts_of)


def _by_calibration(
    preparation: Preparation,
    config: TuningConfig,
    bar: Progress,
    started: float,
    training: Training | None,
    random_state: RandomState,
) -> QuantizedModel:
    """Quantize every op with its first option, judged by nothing, and train where that says so.

    Where latency is the objective, FP32 comes back unless the plan is measured faster.
    """
    prepared = preparation.finish(bar)
    plan = prepared.space.plan((0,) * len(prepared.space.units))
    float_plan = _float_plan(prepared)
    costs = preparation.baseline_costs(bar)
    why = "first option of every op: no eval_func"
    baseline = _unjudged(0, float_plan, costs, "FP32 baseline")
    prepared.model.apply(plan)
    found = _unjudged(1, plan, prepared.plan_costs(plan), why)
    wins = config.objective != "latency" or is_faster(found.costs, baseline.costs)
    best = found if wins else baseline
    trainer, trained = _trainer(prepared, config, training, random_state), None
    if trainer is not None and method_of(best.plan) is not None:
        prepared.model.apply(plan)
        trained = trainer.trained(plan, trainer.training.epochs)
    duration_s = time.monotonic() - started
    result = replace(_result_of(prepared, config, baseline, best, duration_s), trials=(found,))
    if not wins:
        warn_if_nothing_quantized(result, stacklevel=3)
    return _finished(prepared, result, trained)


def _result_of(
    prepared: Prepared,
    config: TuningConfig,
    baseline: TrialRecord,
    best: TrialRecord,
    duration_s: float = 0.0,
) -> TuningResult:
    """Return the result of one plan that nothing judged."""
    return TuningResult(
        config=config,
        baseline_trial=baseline,
        best=best,
        trials=(best,),
        stop_reason="no_eval_func",
        evaluations=0,
        op_table=_op_table(prepared, best.plan, config),
        uncovered=prepared.graph.uncovered,
        unreached=prepared.graph.unreached,
        duration_s=duration_s,
    )


def _unjudged(number: int, plan: Plan, costs: dict[str, float], reason: str) -> TrialRecord:
    return TrialRecord(
        number=number,
        plan=plan,
        accuracy=None,
        metrics={},
        costs=costs,
        meets_goal=None,
        state="complete",
        duration_s=0.0,
        reason=reason,
    )


def _float_plan(prepared: Prepared) -> Plan:
    names = [name for unit in prepared.space.units for name in unit.choices[0].configs]
    names += [follower.name for follower in prepared.space.followers]
    return Plan(dict.fromkeys(names, OpConfig.float()))


def _with_goal(baseline: TrialRecord, prepared: Prepared, config: TuningConfig) -> TrialRecord:
    """Return the baseline with its complete plan, judged by the goal."""
    return judged(replace(baseline, plan=_float_plan(prepared)), config.goal, baseline)


def _op_table(prepared: Prepared, plan: Plan, config: TuningConfig) -> Any:
    return op_table(
        prepared.graph,
        plan,
        prepared.costs,
        prepared.damages,
        config.objective,
        prepared.unrepaired,
    )


def _finished(
    prepared: Prepared, result: TuningResult, trained: QuantizedModel | None = None
) -> QuantizedModel:
    plan, scalings, model = result.best.plan, prepared.scalings, prepared.model
    if trained is not None:
        model = trained._parts.model
    model.apply(plan)
    if not plan.quantized:  # nothing is left that gains by them
        prepared.rescaling.take_back()
        scalings = ()
    model.weights.forget_cache()
    model.weights.rounder = model.corrections.correction = None  # they hold what they go by
    model.norms.reestimate = None
    model.model.eval()
    return QuantizedModel(Parts(model, plan, prepared.folded, result, scalings, prepared.example))


def _parts(prepared: Prepared, plan: Plan, result: TuningResult) -> Parts:
    folded, scalings = prepared.folded, prepared.scalings
    return Parts(prepared.model, plan, folded, result, scalings, prepared.example)


def _refuse(
    config: TuningConfig,
    executor: object,
    eval_func: object,
    forward: object,
    callbacks: tuple[object, ...],
    storage: object,
    study_name: object,
) -> None:
    """Refuse arguments of wrong types, and what later versions bring."""
    if not isinstance(config, TuningConfig):
        raise TunerError(f"config is a {type(config).__name__}: give a TuningConfig")
    functions = [("eval_func", eval_func), ("forward", forward)]
    functions += [("each of callbacks", callback) for callback in callbacks]
    for name, function in functions:
        if function is not None and not callable(function):
            raise TunerError(f"{name} is a {type(function).__name__}: give a function")
    url = storage.url if isinstance(storage, Storage) else storage
    for name, text in (("storage", url), ("study_name", study_name)):
        if text is not None and not isinstance(text, str):
            raise TunerError(f"{name} is a {type(text).__name__}: give a string")
    later = {
        "executor": executor is not None,
        "AccuracyGoal(confidence=…)": config.goal.confidence is not None,
    }
    for name, given in later.items():
        if given:
            raise UnsupportedError(f"{name} is not supported by this version: leave it out")
