"""Trials and ops over HTTP."""

import time
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert, select

from server import cursors
from server.db import Database
from server.jobs import Jobs
from tests.server.helpers import OPS, claimed, record, store, submission, succeeded
from tuner.records import TrialRecord
from tuner.storage import StudyRow, TrialRow


def _without_scores(number: int) -> dict[str, Any]:
    return {key: value for key, value in record(number).items() if key != "scores"}


def _pages(client: TestClient, path: str, limit: int) -> list[Any]:
    found: list[Any] = []
    query: dict[str, Any] = {"limit": limit}
    while True:
        page = client.get(path, params=query).json()
        assert 0 < len(page["items"]) <= limit
        found += page["items"]
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


def test_trials_are_records_by_number_without_the_baseline(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    path = f"/v1/jobs/{succeeded(jobs, database_url, trials=5)}/trials"
    expected = [_without_scores(number) for number in range(1, 6)]
    assert client.get(path).json() == {"items": expected, "next_cursor": None}
    for limit in (1, 2, 5):
        assert _pages(client, path, limit) == expected


def test_a_trial_can_be_read_back_by_the_library(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    path = f"/v1/jobs/{succeeded(jobs, database_url)}/trials/1?scores=true"
    assert TrialRecord.from_dict(client.get(path).json()).to_dict() == record(1)


def test_the_baseline_is_number_0(client: TestClient, jobs: Jobs, database_url: str) -> None:
    path = f"/v1/jobs/{succeeded(jobs, database_url)}/trials"
    assert client.get(f"{path}/0").json() == _without_scores(0)


def test_scores_come_when_asked_for(client: TestClient, jobs: Jobs, database_url: str) -> None:
    job, _ = jobs.submit(submission(), "ann")
    store(jobs, claimed(jobs), database_url, [record(1, scores=[1.0, float("nan")])])
    path = f"/v1/jobs/{job.id}/trials"
    assert "scores" not in client.get(path).json()["items"][0]
    assert "scores" not in client.get(f"{path}/1").json()
    assert client.get(f"{path}?scores=true").json()["items"][0]["scores"] == [1.0, "nan"]
    assert client.get(f"{path}/1?scores=true").json()["scores"] == [1.0, "nan"]


def test_a_failed_trial_is_shown(client: TestClient, jobs: Jobs, database_url: str) -> None:
    job, _ = jobs.submit(submission(), "ann")
    failed = record(1, accuracy=float("nan")) | {
        "accuracy": None,
        "metrics": {"loss": "inf"},
        "meets_goal": None,
        "state": "failed",
        "error": "Traceback …",
    }
    store(jobs, claimed(jobs), database_url, [failed])
    (shown,) = client.get(f"/v1/jobs/{job.id}/trials").json()["items"]
    assert shown == {key: value for key, value in failed.items() if key != "scores"}


def test_a_job_without_trials_has_none(client: TestClient, jobs: Jobs) -> None:
    path = f"/v1/jobs/{jobs.submit(submission(), 'ann')[0].id}"
    for name in ("trials", "ops", "artifacts"):
        assert client.get(f"{path}/{name}").json() == {"items": [], "next_cursor": None}


@pytest.mark.parametrize("name", ["trials", "ops"])
@pytest.mark.parametrize(("last", "status"), [(2**31 - 1, 200), (2**31, 422)])
def test_a_cursor_holds_what_the_database_can(
    name: str, last: int, status: int, client: TestClient, jobs: Jobs
) -> None:
    path = f"/v1/jobs/{jobs.submit(submission(), 'ann')[0].id}/{name}"
    answer = client.get(path, params={"cursor": cursors.encode(name, last)})
    assert answer.status_code == status


@pytest.mark.parametrize("number", ["9", "-1", "x", str(2**31)])
def test_a_trial_that_is_not_there_is_not_found(
    number: str, client: TestClient, jobs: Jobs, database_url: str
) -> None:
    path = f"/v1/jobs/{succeeded(jobs, database_url)}/trials/{number}"
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", ["trials", "trials/1", "ops", "events", "artifacts"])
def test_nothing_is_below_a_job_that_is_not_there(name: str, client: TestClient) -> None:
    answer = client.get(f"/v1/jobs/{'0' * 26}/{name}")
    assert answer.status_code == 404
    assert "there is no job" in answer.json()["detail"]


def test_ops_are_the_rows_of_the_best_plans_table(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    path = f"/v1/jobs/{succeeded(jobs, database_url)}/ops"
    expected = [op.to_dict() for op in OPS]
    assert client.get(path).json() == {"items": expected, "next_cursor": None}
    assert _pages(client, path, 1) == expected


def test_each_job_shows_its_own(client: TestClient, jobs: Jobs, database_url: str) -> None:
    many, few = succeeded(jobs, database_url, trials=4), succeeded(jobs, database_url, trials=1)
    lengths = [len(client.get(f"/v1/jobs/{job}/trials").json()["items"]) for job in (many, few)]
    assert lengths == [4, 1]


def test_a_page_reads_only_its_own_rows(
    client: TestClient, jobs: Jobs, database: Database, database_url: str
) -> None:
    """Pages of 10,000 trials: the last costs what the first does, not 100 times as much."""
    job_id = succeeded(jobs, database_url, trials=0)
    plain = record(1)
    with database.writing() as session:
        name = jobs.get(job_id).study_name
        study = session.scalars(select(StudyRow.id).where(StudyRow.name == name)).one()
        rows = [
            {"study_id": study, "number": n, "state": "complete", "record": plain | {"number": n}}
            for n in range(1, 10_001)
        ]
        session.execute(insert(TrialRow), rows)
    path = f"/v1/jobs/{job_id}/trials"

    def seconds(after: int) -> float:
        query = {"limit": 100, "cursor": cursors.encode("trials", after)}
        begin = time.perf_counter()
        items = client.get(path, params=query).json()["items"]
        assert [item["number"] for item in items] == list(range(after + 1, after + 101))
        return time.perf_counter() - begin

    times = [(seconds(0), seconds(9900)) for _ in range(8)]
    assert min(last for _, last in times) < 3 * min(first for first, _ in times)
