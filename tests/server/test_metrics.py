"""What Prometheus reads, with its own parser, is what happened."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from server import metrics as module
from server.app import create_app
from server.auth import Scope
from server.db import Database
from server.db.models import JobRow, WorkerRow
from server.ids import new_id
from server.jobs import Jobs
from server.metrics import Metrics
from server.settings import Settings
from server.states import State
from tests.server.access import LocalClient, app_of, bearer, guarded
from tests.server.helpers import claimed, record, store, submission

LEASE_S = 30.0
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def metrics(database: Database, monkeypatch: pytest.MonkeyPatch) -> Metrics:
    monkeypatch.setattr(module, "_SETTLED_AFTER", timedelta(0))
    return Metrics(database, LEASE_S)


def samples(content: bytes) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"accutune_{name}", frozenset(labels.items())]


def add_worker(database: Database, state: str, silent_s: float, slots: int) -> None:
    moment = datetime.now(UTC)
    with database.writing() as session:
        row = WorkerRow(id=new_id(), host="h", pid=1, state=state, slots=slots, gpus=[])
        row.version, row.started_at = "1", moment
        row.heartbeat_at = moment - timedelta(seconds=silent_s)
        session.add(row)


def test_an_empty_queue(metrics: Metrics) -> None:
    found = samples(metrics.text())
    assert {value(found, "jobs", state=state) for state in State} == {0.0}
    assert value(found, "oldest_queued_job_seconds") == 0
    assert value(found, "workers") == 0
    assert value(found, "worker_slots") == 0
    assert value(found, "leases_lost_total") == 0


def test_the_depth_of_the_queue_and_the_age_of_its_oldest_job(
    metrics: Metrics, jobs: Jobs, database: Database
) -> None:
    ids = [jobs.submit(submission(), "me")[0].id for _ in range(3)]
    claimed(jobs)
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    with database.writing() as session:
        session.execute(update(JobRow).where(JobRow.id == ids[-1]).values(created_at=hour_ago))
    found = samples(metrics.text())
    assert value(found, "jobs", state="queued") == 2
    assert value(found, "jobs", state="running") == 1
    assert value(found, "jobs", state="failed") == 0
    assert value(found, "oldest_queued_job_seconds") == pytest.approx(3600, abs=60)


def test_only_workers_that_report_are_alive(metrics: Metrics, database: Database) -> None:
    add_worker(database, "running", 0, 2)
    add_worker(database, "draining", LEASE_S, 3)
    add_worker(database, "running", 3 * LEASE_S, 5)
    add_worker(database, "ended", 0, 7)
    found = samples(metrics.text())
    assert value(found, "workers") == 2
    assert value(found, "worker_slots") == 5


def test_lost_leases_are_counted_also_those_that_end_a_job(metrics: Metrics, jobs: Jobs) -> None:
    jobs.submit(submission(max_attempts=2), "me")
    jobs.lose(claimed(jobs), "killed")
    assert value(samples(metrics.text()), "leases_lost_total") == 1
    jobs.lose(claimed(jobs), "killed")
    found = samples(metrics.text())
    assert value(found, "leases_lost_total") == 2
    assert value(found, "jobs", state="failed") == 1


def test_each_trial_is_measured_once(
    metrics: Metrics, jobs: Jobs, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    jobs.submit(submission(), "me")
    claim = claimed(jobs)
    store(jobs, claim, database_url, [record(number) for number in range(5)])
    for _ in range(2):
        found = samples(metrics.text())
        assert value(found, "trial_seconds_count", state="complete") == 5
        assert value(found, "trial_seconds_sum", state="complete") == 2.5
        assert value(found, "trial_seconds_bucket", state="complete", le="0.3") == 0
        assert value(found, "trial_seconds_bucket", state="complete", le="1.0") == 5
    store(jobs, claim, database_url, [record(5)])
    assert value(samples(metrics.text()), "trial_seconds_count", state="complete") == 6


def test_trials_of_before_and_those_that_may_come_out_of_order_wait(
    metrics: Metrics,
    jobs: Jobs,
    database: Database,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs.submit(submission(), "me")
    store(jobs, claimed(jobs), database_url, [record(0)])
    later = Metrics(database, LEASE_S)
    assert b'trial_seconds_count{state="complete"}' not in later.text()
    monkeypatch.setattr(module, "_SETTLED_AFTER", timedelta(seconds=60))
    assert b'trial_seconds_count{state="complete"}' not in metrics.text()


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with guarded(settings) as client:
        yield client


def test_requests_are_counted_by_template(client: TestClient) -> None:
    reader = bearer(client, Scope.READ)
    for number in range(3):
        client.get(f"/v1/jobs/{number:026}", headers=reader)
    client.get("/v1/jobs", headers=reader)
    client.get("/v1/jobs")
    client.get("/secret/path")
    client.request("BREW", "/healthz")
    answer = client.get("/metrics", headers=reader)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.content)
    job = {"method": "GET", "route": "/v1/jobs/{job_id:id}"}
    assert value(found, "http_requests_total", **job, status="404") == 3
    assert value(found, "http_request_seconds_count", **job) == 3
    assert value(found, "http_request_seconds_sum", **job) > 0
    listed = {"method": "GET", "route": "/v1/jobs"}
    assert value(found, "http_requests_total", **listed, status="200") == 1
    assert value(found, "http_requests_total", **listed, status="401") == 1
    unknown = {"method": "GET", "route": "unmatched"}
    assert value(found, "http_requests_total", **unknown, status="404") == 1
    assert b"secret" not in answer.content
    assert b"BREW" not in answer.content
    assert b'method="other"' in answer.content


def test_metrics_need_a_token_where_others_do(client: TestClient, settings: Settings) -> None:
    assert client.get("/metrics").status_code == 401
    with LocalClient(create_app(settings)) as local:
        assert local.get("/metrics").status_code == 200


def test_a_stream_of_events_is_counted_but_not_timed(client: TestClient) -> None:
    submitter = bearer(client, Scope.SUBMIT)
    services = app_of(client).state.services
    job, _ = services.jobs.submit(submission(), "someone")
    client.post(f"/v1/jobs/{job.id}:cancel", headers=submitter)
    accept = {"Accept": "text/event-stream"} | submitter
    assert client.get(f"/v1/jobs/{job.id}/events", headers=accept).status_code == 200
    found = samples(client.get("/metrics", headers=submitter).content)
    route = {"method": "GET", "route": "/v1/jobs/{job_id:id}/events"}
    assert value(found, "http_requests_total", **route, status="200") == 1
    assert value(found, "event_streams") == 0
    assert ("accutune_http_request_seconds_count", frozenset(route.items())) not in found
    with services.hub.watch(job.id):
        open_now = samples(client.get("/metrics", headers=submitter).content)
    assert value(open_now, "event_streams") == 1
