"""Recipes, workers, health and the OpenAPI document over HTTP."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text

from server.app import create_app
from server.db import Database, now
from server.db.models import WorkerRow
from server.ids import new_id
from server.jobs import Jobs
from server.settings import Settings
from tests.server.access import LocalClient
from tests.server.helpers import claimed, submission
from tuner.recipes import RECIPES
from tuner.version import VERSION


def test_recipes_come_with_the_schemas_of_their_parameters(any_client: TestClient) -> None:
    answer = any_client.get("/v1/recipes").json()
    assert [recipe["name"] for recipe in answer["items"]] == sorted(RECIPES)
    assert (answer["next_cursor"], answer["broken"]) == (None, [])
    for recipe in answer["items"]:
        assert recipe["parameters"] == RECIPES[recipe["name"]].parameters.model_json_schema()
        assert any_client.get(f"/v1/recipes/{recipe['name']}").json() == recipe


def test_an_unknown_recipe_is_not_found_with_the_near_ones(any_client: TestClient) -> None:
    answer = any_client.get("/v1/recipes/digit-resnet")
    assert answer.status_code == 404
    assert "digits-resnet" in answer.json()["detail"]


def test_a_broken_recipe_is_listed_and_the_server_starts(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "bad.py").write_text("1 / 0")
    settings = Settings(data_dir=tmp_path, recipes_dir=folder)
    with LocalClient(create_app(settings)) as client:
        (broken,) = client.get("/v1/recipes").json()["broken"]
    assert broken["source"].endswith("bad.py")
    assert broken["error"] == "ZeroDivisionError: division by zero"


def _worker(database: Database, age_s: float, state: str = "running") -> str:
    with database.writing() as session:
        moment = now(session) - timedelta(seconds=age_s)
        row = WorkerRow(
            id=new_id(),
            host="here",
            pid=7,
            state=state,
            slots=2,
            gpus=["0"],
            version=VERSION,
            started_at=moment,
            heartbeat_at=moment,
        )
        session.add(row)
        return row.id


def test_workers_come_with_their_jobs(client: TestClient, jobs: Jobs, database: Database) -> None:
    old, new = _worker(database, 1e6), _worker(database, 0)
    draining, ended = _worker(database, 0, "draining"), _worker(database, 1e6, "ended")
    job, _ = jobs.submit(submission(), "ann")
    claimed(jobs, new)
    items = client.get("/v1/workers").json()["items"]
    assert [item["id"] for item in items] == [ended, draining, new, old]
    assert [item["state"] for item in items] == ["ended", "draining", "running", "lost"]
    assert [item["jobs"] for item in items] == [[], [], [job.id], []]
    assert (items[2]["slots"], items[2]["gpus"], items[2]["pid"]) == (2, ["0"], 7)


def test_workers_come_in_pages(client: TestClient, database: Database) -> None:
    ids = [_worker(database, 0) for _ in range(3)]
    page = client.get("/v1/workers?limit=2").json()
    rest = client.get("/v1/workers", params={"cursor": page["next_cursor"]}).json()
    assert [item["id"] for item in page["items"] + rest["items"]] == ids[::-1]
    assert rest["next_cursor"] is None


def test_a_service_with_all_tables_is_ready(client: TestClient) -> None:
    for path in ("/healthz", "/readyz"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "version": VERSION})


def test_a_service_without_its_tables_is_not_ready(client: TestClient, database: Database) -> None:
    with database.writing() as session:
        current = session.scalars(text("SELECT version_num FROM alembic_version")).one()
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    try:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert "tuner db upgrade" in answer.json()["detail"]
        assert client.get("/healthz").status_code == 200
    finally:
        with database.writing() as session:
            put_back = text("UPDATE alembic_version SET version_num = :current")
            session.execute(put_back, {"current": current})


def test_a_service_whose_database_is_away_starts_and_says_so(tmp_path: Path) -> None:
    url = "postgresql://nobody@127.0.0.1:9/nothing"
    with LocalClient(create_app(Settings(data_dir=tmp_path, database_url=url))) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/readyz", "/v1/jobs"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert answer.json()["type"] == "urn:accutune:problem:database-unavailable"


def test_health_needs_no_token(client_of: Callable[..., TestClient]) -> None:
    plain = client_of()
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert plain.get(path).status_code == 200


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """The OpenAPI document."""
    app: FastAPI = create_app(Settings(data_dir=tmp_path))
    return app.openapi()


def _operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        operation["operationId"]: operation
        for path in document["paths"].values()
        for operation in path.values()
    }


def test_operations_have_the_names_that_clients_are_made_of(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert {
        "submit_job",
        "list_jobs",
        "get_job",
        "cancel_job",
        "pause_job",
        "resume_job",
        "list_trials",
        "get_trial",
        "list_ops",
        "list_events",
        "list_artifacts",
        "download_artifact",
        "head_artifact",
        "list_recipes",
        "get_recipe",
        "list_workers",
        "get_health",
        "get_readiness",
    } <= _operations(document).keys()


def test_every_operation_declares_its_errors_as_problems(document: dict[str, Any]) -> None:
    assert document["components"]["schemas"]["Problem"]["required"]
    for name, operation in _operations(document).items():
        assert operation["summary"], name
        assert operation["tags"], name
        errors = {code: one for code, one in operation["responses"].items() if code >= "400"}
        assert {"401", "422", "429", "500", "503"} <= errors.keys(), name
        for code, one in errors.items():
            assert list(one["content"]) == ["application/problem+json"], (name, code)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_tokens_are_declared_where_they_are_needed(document: dict[str, Any]) -> None:
    assert document["security"] == [{}, {"bearer": []}]
    assert create_app(Settings(auth=True)).openapi()["security"] == [{"bearer": []}]


def test_only_health_is_open_to_all(document: dict[str, Any]) -> None:
    opened = [name for name, one in _operations(document).items() if one.get("security") == []]
    assert opened == ["get_health", "get_readiness"]


def test_the_example_of_a_submission_is_accepted(
    document: dict[str, Any], client: TestClient
) -> None:
    (example,) = document["components"]["schemas"]["Submission"]["examples"]
    assert client.post("/v1/jobs", json=example).status_code == 202
