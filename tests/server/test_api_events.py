"""Events over HTTP: a stream that can be resumed, or a page."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.auth import Scope
from server.jobs import Jobs
from server.routes import events as route
from server.settings import Settings
from server.states import Move
from tests.server.access import with_changes
from tests.server.helpers import claimed, record, store, submission, succeeded
from tests.server.live import service

JSON = {"Accept": "application/json"}
SSE = {"Accept": "text/event-stream"}
PATIENCE_S = 30.0


def _parsed(text: str) -> list[tuple[int, str, Any]]:
    """Return id, kind and data of every event of a stream, as the standard reads them."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if "data" in fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


@contextmanager
def _stream(url: str, **headers: str) -> Iterator[Iterator[str]]:
    with (
        httpx.Client(timeout=PATIENCE_S) as client,
        client.stream("GET", url, headers=SSE | headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield answer.iter_lines()


def _next_data(lines: Iterator[str]) -> Any:
    return json.loads(next(line for line in lines if line.startswith("data: "))[6:])


def _wait_until(condition: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + PATIENCE_S
        time.sleep(0.01)


def test_the_stream_of_an_ended_job_tells_all_and_ends(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    job_id = succeeded(jobs, database_url)
    answer = client.get(f"/v1/jobs/{job_id}/events")
    assert answer.text.startswith("retry: 2000\n\n")
    stored = [(event.id, event.kind, event.data) for event in jobs.events(job_id)]
    assert _parsed(answer.text) == stored
    assert [kind for _, kind, _ in stored] == ["state", "state", *["trial"] * 4, "state"]


def test_a_stream_goes_on_where_it_broke_off(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    job_id = succeeded(jobs, database_url)
    path, ids = f"/v1/jobs/{job_id}/events", [event.id for event in jobs.events(job_id)]
    for query, headers, expected in (
        (f"?after={ids[2]}", {}, ids[3:]),
        ("", {"Last-Event-ID": str(ids[3])}, ids[4:]),
        (f"?after={ids[0]}", {"Last-Event-ID": str(ids[3])}, ids[4:]),  # as browsers come again
    ):
        answer = client.get(path + query, headers=SSE | headers)
        assert [event_id for event_id, _, _ in _parsed(answer.text)] == expected


def test_who_has_seen_the_end_need_not_come_again(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    job_id = succeeded(jobs, database_url)
    last = jobs.events(job_id)[-1].id
    answer = client.get(f"/v1/jobs/{job_id}/events", headers=SSE | {"Last-Event-ID": str(last)})
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("value", ["-1", "x", "1.5", str(2**63)])
def test_an_odd_event_id_is_refused(value: str, any_client: TestClient) -> None:
    path = f"/v1/jobs/{'0' * 26}/events"
    for answer in (
        any_client.get(path, headers={"Last-Event-ID": value}),
        any_client.get(path, params={"after": value}),
    ):
        assert answer.status_code == 422
        assert len(answer.json()["errors"]) == 1


def test_stored_events_come_in_pages(client: TestClient, jobs: Jobs, database_url: str) -> None:
    job_id = succeeded(jobs, database_url)
    path = f"/v1/jobs/{job_id}/events"
    stored = [event.id for event in jobs.events(job_id)]
    found: list[int] = []
    query: dict[str, Any] = {"limit": 3}
    while True:
        page = client.get(path, params=query, headers=JSON).json()
        found += [event["id"] for event in page["items"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert found == stored
    first = client.get(path, headers=JSON).json()["items"][0]
    assert first.keys() == {"id", "kind", "data", "created_at"}
    rest = client.get(path, params={"after": stored[-2]}, headers=JSON).json()["items"]
    assert [event["id"] for event in rest] == stored[-1:]


def test_a_stream_tells_what_happens_when_it_happens(
    live: str, jobs: Jobs, database_url: str
) -> None:
    job, _ = jobs.submit(submission(), "ann")
    with _stream(f"{live}/v1/jobs/{job.id}/events") as lines:
        assert _next_data(lines) == {"state": "queued"}
        claim = claimed(jobs)
        assert _next_data(lines)["state"] == "running"
        store(jobs, claim, database_url, [record(0)])
        assert _next_data(lines)["number"] == 0
        jobs.report(claim, "progress", {"batch": 3})
        assert _next_data(lines) == {"batch": 3}
        jobs.fail(claim, "line one\nline two")
        assert _next_data(lines) == {"error": "line one\nline two"}
        assert _next_data(lines)["state"] == "failed"
        assert [line for line in lines if line] == [f"id: {jobs.events(job.id)[-1].id}"]


def test_many_streams_are_told_and_one_poll_serves_them_all(
    live: str, app: FastAPI, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = jobs.submit(submission(), "ann")
    hub = app.state.services.hub
    polls: list[list[str]] = []
    ask = app.state.services.jobs.last_events

    def counted(job_ids: list[str]) -> dict[str, int]:
        polls.append(list(job_ids))
        found: dict[str, int] = ask(job_ids)
        return found

    monkeypatch.setattr(app.state.services.jobs, "last_events", counted)
    ends: list[Any] = []

    def follow() -> None:
        with _stream(f"{live}/v1/jobs/{job.id}/events") as lines:
            ends.append(_parsed("\n".join(lines))[-1][2]["state"])

    threads = [threading.Thread(target=follow) for _ in range(20)]
    for thread in threads:
        thread.start()
    _wait_until(lambda: hub.watched == 20)
    begin = len(polls)
    time.sleep(1.0)
    assert len(polls) - begin <= 5
    assert all(asked == [job.id] for asked in polls)
    jobs.ask(job.id, Move.CANCEL)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert ends == ["cancelled"] * 20
    _wait_until(lambda: hub.watched == 0)


def test_a_quiet_stream_has_a_heartbeat(
    live: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "HEARTBEAT_S", 0.1)
    job, _ = jobs.submit(submission(), "ann")
    with _stream(f"{live}/v1/jobs/{job.id}/events") as lines:
        comments = [line for line, _ in zip((x for x in lines if x[:1] == ":"), "ab", strict=False)]
    assert comments == [": ping", ": ping"]


def test_a_client_that_leaves_is_forgotten(live: str, app: FastAPI, jobs: Jobs) -> None:
    job, _ = jobs.submit(submission(), "ann")
    hub = app.state.services.hub
    with _stream(f"{live}/v1/jobs/{job.id}/events") as lines:
        _next_data(lines)
        _wait_until(lambda: hub.watched == 1)
    _wait_until(lambda: hub.watched == 0)


def test_a_stream_ends_with_its_token(settings: Settings) -> None:
    with service(with_changes(settings, auth=True)) as (url, app):
        services = app.state.services
        row, secret = services.tokens.create("ann", [Scope.READ])
        job, _ = services.jobs.submit(submission(), "ann")
        path, bearer = f"{url}/v1/jobs/{job.id}/events", f"Bearer {secret}"
        with _stream(path, Authorization=bearer) as lines:
            _next_data(lines)
            services.jobs.ask(job.id, Move.PAUSE)
            assert _next_data(lines)["state"] == "paused"
            services.tokens.revoke(row.id)
            services.jobs.ask(job.id, Move.RESUME)
            assert next((line for line in lines if line.startswith("data")), None) is None


def test_streams_end_when_the_hub_closes(live: str, app: FastAPI, jobs: Jobs) -> None:
    job, _ = jobs.submit(submission(), "ann")
    hub = app.state.services.hub
    with _stream(f"{live}/v1/jobs/{job.id}/events") as lines:
        _next_data(lines)
        _wait_until(lambda: hub.watched == 1)
        hub.close()
        jobs.ask(job.id, Move.PAUSE)
        assert [line for line in lines if line.startswith("data")] == []
