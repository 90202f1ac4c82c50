"""Jobs over HTTP: submitted, listed, read, paused, resumed and cancelled."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx import Response

from server.auth import Scope
from server.jobs import Jobs
from server.settings import Settings
from tests.server.helpers import BODY, claimed, succeeded

ClientOf = Callable[..., TestClient]


def _submit(client: TestClient, key: str | None = None, **fields: Any) -> Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    body = json.dumps(BODY | fields)
    return client.post(
        "/v1/jobs", content=body, headers={"Content-Type": "application/json", **headers}
    )


def _pointers(answer: Response) -> list[str]:
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    return [error["pointer"] for error in answer.json()["errors"]]


def test_a_submitted_job_is_what_the_contract_says(client: TestClient) -> None:
    answer = _submit(client, config={"space": "mixed-int", "max_trials": 7}, labels={"a": "b"})
    assert answer.status_code == 202
    job = answer.json()
    path = f"/v1/jobs/{job['id']}"
    assert answer.headers["location"] == path
    assert job["links"] == {
        "self": path,
        "trials": f"{path}/trials",
        "events": f"{path}/events",
        "artifacts": f"{path}/artifacts",
        "cancel": f"{path}:cancel",
        "pause": f"{path}:pause",
        "resume": f"{path}:resume",
    }
    assert job["progress"] == {"trials": 0, "max_trials": 7}
    assert (job["recipe"], job["params"], job["labels"]) == (
        BODY["recipe"],
        {"epochs": 1},
        {"a": "b"},
    )
    assert (job["state"], job["attempt"], job["owner"]) == ("queued", 0, "local")
    assert (job["priority"], job["max_attempts"], job["timeout_s"]) == (0, 3, None)
    assert job["config"]["space"] == "mixed-int"
    assert job["created_at"].endswith("Z")
    nothing = "started_at finished_at baseline best goal_met quantized_ops stop_reason error"
    assert [job[name] for name in nothing.split()] == [None] * 8
    assert client.get(path).json() == job


def test_the_same_key_gives_the_same_job(client: TestClient) -> None:
    first, again = _submit(client, "k"), _submit(client, "k")
    assert (again.status_code, again.headers["location"]) == (202, first.headers["location"])
    other = _submit(client, "k", priority=1)
    assert other.status_code == 422
    assert other.json()["type"] == "urn:accutune:problem:idempotency-key-reused"
    assert _submit(client, "l").headers["location"] != first.headers["location"]
    assert _submit(client).headers["location"] != _submit(client).headers["location"]


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "é"])
def test_an_odd_key_is_refused(key: str, any_client: TestClient) -> None:
    answer = any_client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": key.encode()})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["in"] == "header"


@pytest.mark.parametrize(
    ("fields", "pointers"),
    [
        ({"params": {"epochs": 0}}, ["/params/epochs"]),
        ({"params": {"epochs": 1, "seed": "x", "more": 1}}, ["/params/seed", "/params/more"]),
        ({"params": {"a/b": 1, "c~d": 1}}, ["/params/a~1b", "/params/c~0d"]),
        ({"params": []}, ["/params"]),
        ({"recipe": 3}, ["/recipe"]),
        ({"recipe": "a\0b"}, ["/recipe"]),
        ({"priority": 10_000, "colour": "red"}, ["/priority", "/colour"]),
        ({"config": {"strategy": "luck"}}, ["/config/strategy"]),
        ({"config": {"goal": {"max_drop": "x"}}}, ["/config/goal/max_drop"]),
        ({"config": {"space": {"preset": "int9"}}}, ["/config/space", "/config/space/preset"]),
        (
            {"config": {"space": {"rules": [{}]}}},
            ["/config/space", "/config/space/rules/0/options"],
        ),
        ({"config": {"goal": {"metric": "\ud800"}}}, ["/config"]),
        ({"labels": {"a": 1}}, ["/labels/a"]),
        ({"labels": {"a:b": "c"}}, ["/labels/a:b"]),
        ({"labels": {'a"b': "c"}}, ['/labels/a"b']),
        ({"timeout_s": 0}, ["/timeout_s"]),
        ({"max_attempts": 0}, ["/max_attempts"]),
    ],
)
def test_what_is_wrong_is_pointed_at(
    fields: dict[str, Any], pointers: list[str], any_client: TestClient
) -> None:
    assert _pointers(_submit(any_client, **fields)) == pointers


def test_a_missing_field_is_pointed_at(any_client: TestClient) -> None:
    assert _pointers(any_client.post("/v1/jobs", json={})) == ["/recipe"]


def test_an_unknown_recipe_is_refused_with_the_near_ones(any_client: TestClient) -> None:
    answer = _submit(any_client, recipe="digit-resnet")
    assert _pointers(answer) == ["/recipe"]
    assert "Did you mean digits-resnet" in answer.json()["detail"]


@pytest.mark.parametrize("value", ["1e999", "NaN", "Infinity"])
def test_what_is_no_number_cannot_be_a_parameter(value: str, any_client: TestClient) -> None:
    params = f'{{"outlier_factor": {value}}}'
    answer = any_client.post(
        "/v1/jobs",
        content=f'{{"recipe": "digits-vit-outliers", "params": {params}}}',
        headers={"Content-Type": "application/json"},
    )
    assert _pointers(answer)[0].startswith("/params")


def test_parameters_are_kept_as_given_without_defaults(any_client: TestClient) -> None:
    job = _submit(any_client, params={"seed": "4"}).json()
    assert job["params"] == {"seed": 4}


def test_who_has_too_many_jobs_must_wait(settings: Settings, client_of: ClientOf) -> None:
    client = client_of("ann")
    services = client.app.state.services  # type: ignore[attr-defined]
    few = settings.model_copy(update={"max_queued_jobs": 1})
    object.__setattr__(services, "settings", few.model_copy(update={"auth": True}))
    assert _submit(client).status_code == 202
    answer = _submit(client)
    assert answer.status_code == 429
    assert answer.json()["type"] == "urn:accutune:problem:quota-exceeded"


def test_a_job_has_an_etag_that_changes_with_it(client: TestClient) -> None:
    path = _submit(client).headers["location"]
    tag = client.get(path).headers["etag"]
    for header in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        answer = client.get(path, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    client.post(f"{path}:pause")
    answer = client.get(path, headers={"If-None-Match": tag})
    assert answer.status_code == 200
    assert answer.headers["etag"] != tag


def test_a_job_can_be_paused_resumed_and_cancelled(client: TestClient) -> None:
    path = _submit(client).headers["location"]
    for move, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = client.post(f"{path}:{move}")
        assert answer.status_code == 202
        assert answer.json()["state"] == state
        assert client.get(path).json() == answer.json()
    answer = client.post(f"{path}:resume")
    assert answer.status_code == 409
    problem = answer.json()
    assert (problem["type"], problem["state"]) == ("urn:accutune:problem:wrong-state", "cancelled")


def test_a_running_job_is_asked(client: TestClient, jobs: Jobs) -> None:
    path = _submit(client).headers["location"]
    claimed(jobs)
    assert client.post(f"{path}:pause").json()["state"] == "pausing"
    assert client.post(f"{path}:cancel").json()["state"] == "cancelling"


def test_a_finished_job_shows_what_it_found(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    job = client.get(f"/v1/jobs/{succeeded(jobs, database_url)}").json()
    assert (job["state"], job["goal_met"], job["quantized_ops"]) == ("succeeded", True, 1)
    assert (job["baseline"], job["stop_reason"]) == (0.9, "max_trials")
    assert job["progress"] == {"trials": 3, "max_trials": 50}
    assert job["best"]["number"] == 3
    assert not {"plan", "scores"} & job["best"].keys()
    assert job["finished_at"] >= job["started_at"] >= job["created_at"]


def test_a_job_that_is_not_there_is_not_found(any_client: TestClient) -> None:
    for job_id in ("0" * 26, "x", "%00", "A" * 26, "a" * 300):
        for answer in (
            any_client.get(f"/v1/jobs/{job_id}"),
            any_client.post(f"/v1/jobs/{job_id}:cancel"),
        ):
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "application/problem+json"


def test_a_list_comes_in_pages(client: TestClient) -> None:
    ids = [_submit(client).json()["id"] for _ in range(5)]
    found, cursor = [], None
    for expected in (2, 2, 1):
        query = {"limit": 2} | ({} if cursor is None else {"cursor": cursor})
        page = client.get("/v1/jobs", params=query).json()
        assert len(page["items"]) == expected
        found += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
    assert found == ids[::-1]
    assert cursor is None


def test_a_list_can_be_filtered(client: TestClient) -> None:
    one = _submit(client, labels={"team": "vision"}).json()["id"]
    two = _submit(client, recipe="char-lm", params={}).json()["id"]
    client.post(f"/v1/jobs/{two}:cancel")
    for query, ids in (
        ("state=queued", [one]),
        ("state=queued&state=cancelled", [two, one]),
        ("recipe=char-lm", [two]),
        ("owner=local", [two, one]),
        ("owner=bob", []),
        ("label=team:vision", [one]),
        ("label=team:v:w", []),
        ("state=failed", []),
    ):
        found = client.get(f"/v1/jobs?{query}").json()
        assert [job["id"] for job in found["items"]] == ids, query


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=x",
        "state=sleeping",
        "cursor=%21",
        "cursor=aaaa",
        "cursor=",
        "recipe=%00",
        "label=team",
        "label=a%22b:c",
    ],
)
def test_an_odd_query_is_refused(query: str, any_client: TestClient) -> None:
    answer = any_client.get(f"/v1/jobs?{query}")
    assert answer.status_code == 422
    name = query.partition("=")[0]
    assert answer.json()["errors"][0]["in"] == "query"
    assert answer.json()["errors"][0]["parameter"].split(".")[0] == name


def test_a_cursor_of_another_list_is_refused(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    job_id = succeeded(jobs, database_url)
    cursor = client.get(f"/v1/jobs/{job_id}/trials?limit=1").json()["next_cursor"]
    assert client.get(f"/v1/jobs/{job_id}/trials?cursor={cursor}").status_code == 200
    assert client.get(f"/v1/jobs?cursor={cursor}").status_code == 422


def test_only_the_owner_or_an_admin_may_change_a_job(client_of: ClientOf) -> None:
    ann, bob, admin = client_of("ann"), client_of("bob"), client_of("root", Scope.ADMIN)
    path = _submit(ann).headers["location"]
    assert ann.get(path).json()["owner"] == "ann"
    assert bob.get(path).status_code == 200  # a team reads all
    for move in ("pause", "resume", "cancel"):
        answer = bob.post(f"{path}:{move}")
        assert answer.status_code == 403
        assert "belongs to 'ann'" in answer.json()["detail"]
    assert ann.post(f"{path}:pause").status_code == 202
    assert admin.post(f"{path}:cancel").status_code == 202


def test_who_may_only_read_cannot_submit(client_of: ClientOf) -> None:
    reader = client_of("ann", Scope.READ)
    assert _submit(reader).status_code == 403
    assert reader.get("/v1/jobs").status_code == 200
    path = _submit(client_of("ann")).headers["location"]
    assert reader.post(f"{path}:cancel").status_code == 403


def test_a_key_belongs_to_its_owner(client_of: ClientOf) -> None:
    ann, bob = client_of("ann"), client_of("bob")
    assert _submit(ann, "k").headers["location"] != _submit(bob, "k").headers["location"]
