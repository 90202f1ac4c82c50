"""Worker, supervisor and the process of a job together: real jobs from claim to end."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from server.db import Database
from server.db.models import ArtifactRow, JobRow, OpRow, WorkerRow
from server.errors import SettingsError
from server.jobs import Jobs
from server.settings import Settings
from server.states import ENDED, Move, State
from server.worker import Worker
from tests.server.runs import RECIPES, Bench, until, working

_JOBS: dict[str, dict[str, Any]] = {
    "none": {},
    "lower": {"behaviour": "lower"},
    "raise": {"behaviour": "raise", "times": 9},
    "quit": {"behaviour": "quit", "times": 9},
    "die-once": {"behaviour": "die", "at": 3},
    "unseeded": {"behaviour": "die", "at": 3, "seeded": False},
    "eat": {"behaviour": "eat"},
}
_MEMORY_BYTES = 1 << 30


@pytest.fixture(scope="module")
def day(
    _sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Bench, dict[str, JobRow]]]:
    """All jobs that need nobody, run by one worker, two at a time; and how each ended."""
    folder = tmp_path_factory.mktemp("day")
    data = folder / "data"
    data.mkdir()
    shutil.copy(_sqlite_template, data / "accutune.db")
    settings = Settings(
        data_dir=data,
        recipes_dir=RECIPES,
        poll_s=0.1,
        slots=2,
        memory_limit_bytes=_MEMORY_BYTES,
    )
    database = Database(settings.database)
    bench = Bench(settings, Jobs(database), database, folder)
    ids = {
        name: bench.submit(name, {"max_attempts": 1 if name == "eat" else 2}, **params)
        for name, params in _JOBS.items()
    }
    ids["unknown"] = bench.submit("unknown", {"recipe": "tinny"})
    with working(settings):
        ended = {name: bench.wait_for(job_id, *ENDED) for name, job_id in ids.items()}
    yield bench, ended
    database.close()


Day = tuple[Bench, dict[str, JobRow]]


def test_a_job_comes_to_what_fit_comes_to(day: Day) -> None:
    bench, ended = day
    bench.assert_undisturbed(ended["none"].id)
    assert bench.count("evaluated", "none") == ended["none"].trials + 1
    job = ended["none"]
    assert (job.goal_met, job.stop_reason) == (True, "goal_met_and_minimal")
    assert job.quantized_ops == 2
    assert job.best is not None
    assert set(job.best) & {"plan", "scores"} == set()
    assert (job.attempt, job.error) == (1, None)


def test_the_artifacts_are_those_of_the_row(day: Day) -> None:
    bench, ended = day
    folder = bench.settings.artifacts_dir / ended["none"].id
    with bench.database.reading() as session:
        mine = ArtifactRow.job_id == ended["none"].id
        rows = list(session.scalars(select(ArtifactRow).where(mine)))
    stored = {row.name: (row.size_bytes, row.sha256) for row in rows}
    found = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
    }
    assert stored == found
    model = {"plan.json", "weights.safetensors", "config.json", "result.json"}
    assert stored.keys() == model | {"report.html", "run.log"}
    assert "trial 1: accuracy" in (folder / "run.log").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result["stop_reason"] == ended["none"].stop_reason


def test_the_ops_of_the_best_plan_are_stored(day: Day) -> None:
    bench, ended = day
    with bench.database.reading() as session:
        mine = select(OpRow).where(OpRow.job_id == ended["none"].id)
        rows = [row.summary for row in session.scalars(mine.order_by(OpRow.position))]
    assert [row["name"] for row in rows] == ["1", "3"]


def test_phases_are_events(day: Day) -> None:
    bench, ended = day
    events = bench.jobs.events(ended["none"].id)
    phases = [event.data["phase"] for event in events if event.kind == "progress"]
    assert phases == [
        "preparing",
        "recording",
        "evaluating FP32",
        "calibrating",
        "rescaling channels",
        "predicting damage",
        "searching",
    ]


def test_the_direction_of_the_recipes_metric_is_adopted(day: Day) -> None:
    _, ended = day
    job = ended["lower"]
    assert job.state == State.SUCCEEDED
    assert job.config["goal"]["higher_is_better"] is False
    assert job.baseline is not None
    assert job.baseline < 0.1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raise", "ValueError: no score today"),
        ("quit", "SystemExit: 0"),
        ("unknown", "unknown recipe 'tinny'. Did you mean tiny?"),
    ],
)
def test_what_would_fail_again_fails_at_once(name: str, told: str, day: Day) -> None:
    _, ended = day
    job = ended[name]
    assert (job.state, job.attempt, job.crashes) == (State.FAILED, 1, 0)
    assert job.error is not None
    assert job.error.startswith("Traceback")
    assert told in job.error
    assert "\0" not in job.error


def test_a_process_that_dies_is_followed_by_one_that_goes_on(day: Day) -> None:
    bench, ended = day
    job = ended["die-once"]
    bench.assert_undisturbed(job.id)
    assert (job.attempt, job.crashes) == (2, 1)
    assert bench.count("evaluated", "die-once") == job.trials + 1
    (loss,) = bench.losses(job.id)
    assert "SIGKILL" in loss
    assert "about to die" in loss


def test_a_recipe_that_is_not_seeded_goes_on_with_the_first_weights(day: Day) -> None:
    bench, ended = day
    job = ended["unseeded"]
    assert (job.state, job.crashes) == (State.SUCCEEDED, 1), job.error
    assert bench.count("evaluated", "unseeded") == job.trials + 1


def test_a_job_that_eats_the_memory_is_killed(day: Day) -> None:
    _, ended = day
    job = ended["eat"]
    assert (job.state, job.crashes) == (State.FAILED, 1)
    assert job.error is not None
    assert "needed more than 1.00 GiB of memory" in job.error


def test_nothing_is_left_of_ended_jobs_but_their_files(day: Day) -> None:
    bench, ended = day
    folder = bench.settings.artifacts_dir
    succeeded = {job.id for job in ended.values() if job.state == State.SUCCEEDED}
    assert {path.name for path in folder.iterdir()} == succeeded
    assert list(bench.settings.models_dir.iterdir()) == []


@pytest.fixture
def bench(settings: Settings, jobs: Jobs, database: Database, tmp_path: Path) -> Bench:
    """A service on either database, with the recipes of the tests."""
    changes = {"recipes_dir": RECIPES, "poll_s": 0.1, "kill_after_s": 5.0}
    return Bench(settings.model_copy(update=changes), jobs, database, tmp_path)


def test_pause_ends_the_trial_and_resume_repeats_none(bench: Bench) -> None:
    job_id = bench.submit(behaviour="hold", at=3)
    with working(bench.settings):
        bench.wait_for_mark("acted")
        bench.jobs.ask(job_id, Move.PAUSE)
        bench.let_go()
        bench.wait_for(job_id, State.PAUSED)
        assert bench.count("evaluated") == len(bench.records(job_id)) == 4
        bench.jobs.ask(job_id, Move.RESUME)
        bench.wait_for(job_id, *ENDED)
    bench.assert_undisturbed(job_id)
    assert bench.count("evaluated") == len(bench.records(job_id))


def test_cancel_ends_an_evaluation_in_the_middle(bench: Bench) -> None:
    job_id = bench.submit(behaviour="hold", at=2)
    with working(bench.settings):
        bench.wait_for_mark("acted")
        bench.jobs.ask(job_id, Move.CANCEL)
        job = bench.wait_for(job_id, *ENDED)
        assert job.state == State.CANCELLED
        assert job.finished_at is not None
        asked = [e.created_at for e in bench.jobs.events(job_id) if e.data == _CANCELLING]
        assert (job.finished_at - asked[0]).total_seconds() < bench.settings.kill_after_s
        until(lambda: not list(bench.settings.models_dir.iterdir()), "the weights are removed")
    assert bench.count("evaluated") == len(bench.records(job_id)) == 2


_CANCELLING = {"state": "cancelling", "attempt": 1}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_json_logs_name_the_job_and_the_trial(bench: Bench) -> None:
    settings = bench.settings.model_copy(update={"log_json": True})
    job_id = bench.submit(fields={"config": {"max_trials": 2}})
    with working(settings):
        bench.wait_for(job_id, *ENDED)
    (log,) = settings.logs_dir.glob(f"{job_id}-*.log")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["job_id"] for line in lines} == {job_id}
    trials = [line["trial"] for line in lines if "trial" in line]
    assert trials == list(range(1, len(bench.records(job_id))))


def test_a_worker_is_in_the_table_from_its_start_to_its_end(bench: Bench) -> None:
    def row(worker: Worker) -> WorkerRow | None:
        with bench.database.reading() as session:
            return session.get(WorkerRow, worker.id)

    quick = bench.settings.model_copy(update={"lease_s": 0.3, "slots": 3, "gpus": ("0", "1")})
    with working(quick) as worker:
        until(lambda: row(worker), "the row is there")
        first = row(worker)
        assert first is not None
        assert (first.state, first.slots, first.gpus) == ("running", 3, ["0", "1"])
        until(lambda: row(worker).heartbeat_at > first.heartbeat_at, "the heart beats")
        with bench.database.writing() as session:
            session.delete(session.get_one(WorkerRow, worker.id))
        until(lambda: row(worker), "a row that was deleted comes back")
    last = row(worker)
    assert last is not None
    assert last.state == "ended"


def test_a_database_without_tables_is_refused(empty_url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tuner db upgrade"):
        Worker(Settings(data_dir=tmp_path, database_url=empty_url)).run()
