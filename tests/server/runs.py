"""Workers, and jobs of the recipe in recipes/tiny.py, whose evaluations leave marks in a folder."""

import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from sqlalchemy import select

from server.catalog import Catalog
from server.db import Database
from server.db.models import JobRow
from server.jobs import Jobs
from server.schemas import Submission
from server.settings import Settings
from server.states import State
from server.worker import Worker, run
from tuner import quantization
from tuner.config import TuningConfig
from tuner.storage import StudyRow, TrialRow

RECIPES = Path(__file__).parent / "recipes"
CONFIG: dict[str, Any] = {"space": "mixed-int", "max_trials": 12, "goal": {"max_drop": 0.02}}
PATIENCE_S = 600.0  # a start takes five seconds, on a busy machine a minute


@dataclass(frozen=True)
class Bench:
    """A service's data folder, its queue, and a folder for marks."""

    settings: Settings
    jobs: Jobs
    database: Database
    folder: Path

    def submit(
        self, name: str = "job", fields: Mapping[str, Any] | None = None, **params: Any
    ) -> str:
        """Queue a job of the tiny recipe; return its id. It leaves its marks under its name."""
        params = {"folder": str(self.folder / name), **params}
        body = {"recipe": "tiny", "params": params, "config": CONFIG} | dict(fields or {})
        return self.jobs.submit(Submission(**body), "local")[0].id

    def count(self, mark: str, name: str = "job") -> int:
        """Return how often something was marked."""
        path = self.folder / name / mark
        return len(path.read_bytes()) if path.exists() else 0

    def wait_for_mark(self, mark: str, count: int = 1, name: str = "job") -> None:
        """Wait until something was marked so often."""
        until(lambda: self.count(mark, name) >= count, mark)

    def let_go(self, name: str = "job") -> None:
        """Let an evaluation that holds go on."""
        (self.folder / name / "go").touch()

    def wait_for(self, job_id: str, *states: State) -> JobRow:
        """Return the job once it is in one of these states."""
        until(lambda: self.jobs.get(job_id).state in states, lambda: self.told(job_id))
        return self.jobs.get(job_id)

    def told(self, job_id: str) -> str:
        """Return what is known of a job, for the message of a test that fails."""
        events = [(event.kind, event.data) for event in self.jobs.events(job_id)]
        logs = [path.read_text() for path in self.settings.logs_dir.glob(f"{job_id}-*.log")]
        return f"{self.jobs.get(job_id).state}: {events[-5:]} {''.join(logs)[-3000:]}"

    def losses(self, job_id: str) -> list[str]:
        """Return why attempts at a job were lost."""
        states = [event.data for event in self.jobs.events(job_id) if event.kind == "state"]
        return [data["reason"] for data in states if "reason" in data]

    def records(self, job_id: str) -> list[dict[str, Any]]:
        """Return the stored trials of a job, the baseline first."""
        study = select(StudyRow.id).where(StudyRow.name == f"job-{job_id}").scalar_subquery()
        query = select(TrialRow.record).where(TrialRow.study_id == study).order_by(TrialRow.number)
        with self.database.reading() as session:
            return list(session.scalars(query))

    def assert_undisturbed(self, job_id: str) -> None:
        """Assert that a job came to what a run comes to that nothing disturbs, each trial once."""
        job = self.jobs.get(job_id)
        assert job.state == State.SUCCEEDED, self.told(job_id)
        expected, plan = undisturbed()
        assert [_outcome(record) for record in self.records(job_id)] == expected
        events = [event.data for event in self.jobs.events(job_id) if event.kind == "trial"]
        assert [event["number"] for event in events] == list(range(len(expected)))
        assert job.trials == len(expected) - 1
        stored = (self.settings.artifacts_dir / job_id / "plan.json").read_text()
        assert json.loads(stored) == plan


def until(condition: Callable[[], object], told: str | Callable[[], str]) -> None:
    """Wait for a condition; after a while fail, telling what was waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, told if isinstance(told, str) else told()
        time.sleep(0.05)


@cache
def undisturbed() -> tuple[list[dict[str, Any]], Any]:
    """Return the outcomes of all trials, and the plan, of a run in this process."""
    with tempfile.TemporaryDirectory() as folder:
        task = Catalog.load(RECIPES).get("tiny").task(folder=folder)
        config = TuningConfig.model_validate(CONFIG)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        model = quantization.fit(
            task.model, task.calib_dataloader, task.eval_func, config, progress=False
        )
    result = model.result
    outcomes = [_outcome(r.to_dict()) for r in (result.baseline_trial, *result.trials)]
    return outcomes, json.loads(model.plan.to_json())


def _outcome(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal of a trial: all but its time."""
    plan = {} if record["number"] == 0 else record["plan"]  # the baseline's is stored empty
    return {**record, "duration_s": None, "plan": plan, "meets_goal": None}


@contextmanager
def working(settings: Settings) -> Iterator[Worker]:
    """Run a worker in a thread of this process."""
    worker = Worker(settings)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        worker.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@contextmanager
def worker_process(settings: Settings) -> Iterator[BaseProcess]:
    """Run a worker in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server.worker"])
    process = context.Process(target=run, args=(settings,))
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def child_of(pid: int | None) -> psutil.Process:
    """Return the process of the one job that a worker's process runs."""
    children = psutil.Process(pid).children()
    (found,) = [child for child in children if "server.runner" in child.cmdline()]
    return found


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; as a zombie it has."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
