"""The process of one job: `python -m server.runner`, started by a worker."""

import ctypes
import faulthandler
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from server import logs, model_weights
from server.catalog import Catalog
from server.db import Database
from server.db.models import JobRow
from server.errand import Errand, ExitCode
from server.errors import DatabaseError, LeaseLostError
from server.jobs import Ending, Jobs
from server.logs import bind
from server.outputs import Outputs
from server.patience import patiently
from server.settings import Settings
from server.states import State
from tuner import quantization
from tuner.allocator import keep_freed_memory
from tuner.config import TuningConfig
from tuner.errors import StudyMismatchError, TuningCancelled
from tuner.progress import Progress
from tuner.quantized_model import QuantizedModel
from tuner.recipes import Task
from tuner.recipes.assets import assets_in
from tuner.records import TrialRecord, storable
from tuner.results import TuningResult
from tuner.storage import Storage

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_LEAST_TIMEOUT_S = 1e-3
_MAY_PASS = (
    MemoryError,
    torch.OutOfMemoryError,
    OSError,
    DatabaseError,
    OperationalError,
    InterfaceError,
)
_OTHER_WEIGHTS = (
    "This attempt did not come to the model, space or seed that the job began with. Weights are "
    "kept in the folder `models` of the data folder: let all workers share the data folder, or "
    "make the recipe give the same weights on every host; then submit the job again."
)
_log = logging.getLogger(__name__)


class Stop:
    """Whether the worker, or the job's row, asked to stop after the running trial."""

    def __init__(self) -> None:
        self.is_asked = False

    def ask(self, *_: object) -> None:
        """Take note of it; a signal handler."""
        self.is_asked = True

    def check(self, *_: object) -> None:
        """Raise TuningCancelled if it was asked for; a callback of fit()."""
        if self.is_asked:
            raise TuningCancelled("the worker asked to stop")


class Phases(Progress):
    """Reports the phases of a job, and stops between them where that was asked for."""

    def __init__(self, jobs: Jobs, errand: Errand, stop: Stop) -> None:
        super().__init__(enabled=False)
        self._jobs = jobs
        self._claim = errand.claim
        self._stop = stop
        self._starts = 0

    def start(self, goal_text: str, max_trials: int | None) -> None:
        """Report the search itself, before which fit() says the goal for the second time."""
        super().start(goal_text, max_trials)
        self._starts += 1
        if self._starts == 2:
            self.phase("searching")

    def trial(self, record: TrialRecord, best: TrialRecord, baseline: TrialRecord) -> None:
        """Write the trial into the log."""
        super().trial(record, best, baseline)
        outcome = record.error or f"accuracy {record.accuracy}"
        with bind(trial=record.number):
            _log.info("trial %d: %s, best %d", record.number, outcome, best.number)

    def phase(self, name: str, total: int | None = None) -> None:
        """Report a phase; a database that is away does not need to know."""
        super().phase(name, total)
        _log.info("%s", name)
        self._stop.check()
        try:
            self._jobs.report(self._claim, "progress", {"phase": name})
        except DatabaseError as error:
            _log.warning("phase %s cannot be reported: %s", name, error)


class Runner:
    """Runs the job of an errand to its end, or as far as it may."""

    def __init__(self, settings: Settings, errand: Errand, stop: Stop) -> None:
        self._settings = settings
        self._errand = errand
        self._claim = errand.claim
        self._stop = stop
        self._jobs = Jobs(Database(settings.database))

    def run(self) -> ExitCode:
        """Run the job and say how that ended; the job's row says more where it has ended."""
        try:
            return self._tuned()
        except KeyboardInterrupt:
            return ExitCode.INTERRUPTED
        except LeaseLostError as error:
            _log.warning("%s", error)
            return ExitCode.LEASE_LOST
        except StudyMismatchError:
            return self._failed(f"{traceback.format_exc()}\n{_OTHER_WEIGHTS}")
        # The recipe's code may raise anything: this is the boundary where it is told.
        except (Exception, SystemExit) as error:
            if isinstance(error, TuningCancelled) and self._stop.is_asked:
                return ExitCode.STOPPED
            traceback.print_exc()
            return ExitCode.RETRY if may_pass(error) else self._failed(traceback.format_exc())

    def _tuned(self) -> ExitCode:
        phases = Phases(self._jobs, self._errand, self._stop)
        phases.phase("preparing")
        job = self._patiently(partial(self._jobs.get, self._claim.job_id))
        task = self._task(job)
        config = completed(TuningConfig.model_validate(job.config), task)
        self._patiently(partial(self._jobs.complete, self._claim, config.model_dump(mode="json")))
        model = self._fitted(job, task, remaining(config, job.spent_s), phases)
        if self._stop.is_asked and model.result.stop_reason == "cancelled":
            return ExitCode.STOPPED
        return self._succeeded(model)

    def _task(self, job: JobRow) -> Task:
        """Build the recipe's task, its model with the weights that the job began with."""
        recipe = Catalog.load(self._settings.recipes_dir).get(job.recipe)
        _seed(job.config["seed"])
        with assets_in(self._settings.assets_dir):
            task = recipe.task(**job.params)
        model_weights.keep(task.model, model_weights.path_of(self._settings.models_dir, job.id))
        return task

    def _fitted(
        self, job: JobRow, task: Task, config: TuningConfig, phases: Phases
    ) -> QuantizedModel:
        storage = Storage(
            self._settings.database,
            guard=self._take_note,
            fence=partial(self._jobs.check, self._claim),
            patience_s=self._settings.lease_s,
        )
        _seed(config.seed)  # whether the recipe trained its model or had it already
        return quantization.fit(
            task.model,
            task.calib_dataloader,
            task.eval_func,
            config,
            storage=storage,
            study_name=job.study_name,
            callbacks=[self._stop.check],
            progress=phases,
        )

    def _take_note(self, session: Session, number: int, record: Mapping[str, Any]) -> None:
        """Note a trial as it is stored, and let it be the last if the job is to pause."""
        if self._jobs.store_trial(self._claim, session, number, record) == State.PAUSING:
            self._stop.ask()

    def _succeeded(self, model: QuantizedModel) -> ExitCode:
        outputs = Outputs(self._settings.artifacts_dir, self._claim.job_id, self._claim.fence)
        try:
            artifacts = outputs.write(model, self._errand.log)
            ending = ended(model.result)
            self._patiently(
                partial(self._jobs.succeed, self._claim, ending, artifacts, outputs.publish)
            )
        finally:
            outputs.discard()
        return ExitCode.DONE

    def _failed(self, reason: str) -> ExitCode:
        try:
            self._patiently(partial(self._jobs.fail, self._claim, storable(reason)))
        except LeaseLostError:
            return ExitCode.LEASE_LOST
        except DatabaseError:
            return ExitCode.RETRY
        return ExitCode.DONE

    def _patiently(self, access: Callable[[], T]) -> T:
        return patiently(access, self._settings.lease_s)


def completed(config: TuningConfig, task: Task) -> TuningConfig:
    """Return the configuration with the direction of the task's metric."""
    goal = config.goal
    if task.higher_is_better or not goal.prefers_higher or goal.at_least is not None:
        return config
    downwards = goal.model_copy(update={"higher_is_better": False})
    return config.model_copy(update={"goal": downwards})


def remaining(config: TuningConfig, spent_s: float) -> TuningConfig:
    """Return the configuration with what earlier attempts left of the time."""
    if config.timeout_s is None:
        return config
    left_s = max(config.timeout_s - spent_s, _LEAST_TIMEOUT_S)
    return config.model_copy(update={"timeout_s": left_s})


def ended(result: TuningResult) -> Ending:
    """Return what the job's row keeps of a result."""
    return Ending(
        best=_shown(result.best),
        baseline=result.baseline,
        goal_met=result.goal_met,
        quantized_ops=result.quantized_ops,
        stop_reason=result.stop_reason,
        ops=[row.to_dict() for row in result.op_table],
    )


def may_pass(error: BaseException) -> bool:
    """Whether disk, memory or database were at fault, so that another attempt may go well."""
    return any(
        isinstance(cause, _MAY_PASS)
        or (isinstance(cause, DBAPIError) and cause.connection_invalidated)
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _shown(record: TrialRecord) -> dict[str, object]:
    hidden = ("plan", "scores")
    return {key: value for key, value in record.to_dict().items() if key not in hidden}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _die_with(worker_pid: int) -> None:
    """End this process when its worker ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(worker_pid,), daemon=True).start()
    if os.getppid() != worker_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(worker_pid: int) -> None:
    while os.getppid() == worker_pid:
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the job that the worker names."""
    errand = Errand.parse(arguments)
    stop = Stop()
    signal.signal(signal.SIGTERM, stop.ask)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may inherit another
    _die_with(errand.worker_pid)
    faulthandler.enable()
    keep_freed_memory()
    settings = Settings()
    logs.setup(settings.log_json)
    with bind(job_id=errand.claim.job_id):
        return Runner(settings, errand, stop).run()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that a recipe left running must not keep the worker waiting
