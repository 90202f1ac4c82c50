"""What ended jobs leave is removed, and what others still need is not."""

import os
import time
from pathlib import Path

import pytest

from server import leftovers, model_weights
from server.jobs import Jobs
from server.settings import Settings
from server.states import Move
from tests.server.helpers import claimed, submission


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_only_what_ended_is_swept(settings: Settings, jobs: Jobs) -> None:
    ended, held = (jobs.submit(submission(), "local")[0].id for _ in range(2))
    jobs.ask(ended, Move.CANCEL)
    assert claimed(jobs).job_id == held
    ids = (ended, held, "0" * 26)
    files = [model_weights.path_of(settings.models_dir, job_id) for job_id in ids]
    folders = [settings.artifacts_dir / f".{job_id}-1" for job_id in ids]
    for path in (*files, *(folder / "plan.json" for folder in folders)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (settings.artifacts_dir / ended).mkdir()
    leftovers.sweep(settings, jobs)
    assert list(settings.models_dir.iterdir()) == [files[1]]
    assert {path.name for path in settings.artifacts_dir.iterdir()} == {ended, f".{held}-1"}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_old_logs_of_ended_jobs_are_removed(settings: Settings, jobs: Jobs) -> None:
    ended, held = (jobs.submit(submission(), "local")[0].id for _ in range(2))
    jobs.ask(ended, Move.CANCEL)
    claimed(jobs)
    settings.logs_dir.mkdir(parents=True)
    names = (f"{ended}-1", f"{ended}-2", f"{held}-1")
    old, young, needed = (settings.logs_dir / f"{name}.log" for name in names)
    for path in (old, young, needed):
        path.touch()
    month_ago = time.time() - 31 * 24 * 3600
    for path in (old, needed):
        os.utime(path, (month_ago, month_ago))
    leftovers.sweep(settings, jobs)
    assert set(settings.logs_dir.iterdir()) == {young, needed}


def test_nothing_to_sweep_is_no_error(settings: Settings, jobs: Jobs, tmp_path: Path) -> None:
    leftovers.sweep(settings.model_copy(update={"data_dir": tmp_path / "none"}), jobs)
