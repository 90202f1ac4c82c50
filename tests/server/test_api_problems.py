"""Every error is a problem document, and none tells what only the log may know."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from httpx import Response

from server.app import create_app
from server.auth import PUBLIC
from server.errors import RateLimitError
from server.settings import Settings
from tests.server.access import LocalClient, on_sqlite
from tests.server.helpers import BODY

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def broken(settings: Settings) -> Iterator[TestClient]:
    """A client of an application with routes that fail."""
    app = create_app(settings)

    @app.get("/bug", openapi_extra=PUBLIC)
    def bug() -> None:
        raise ValueError("the secret is 42")

    @app.get("/teapot", openapi_extra=PUBLIC)
    def teapot() -> None:
        raise HTTPException(418, "short and stout")

    @app.get("/busy", openapi_extra=PUBLIC)
    def busy() -> None:
        raise RateLimitError("slowly", 7)

    with LocalClient(app, raise_server_exceptions=False) as client:
        yield client


def _check(answer: Response, status: int, slug: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:accutune:problem:{slug}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"] == answer.request.url.path


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        (b"{", 400, "malformed"),
        (b"", 422, "invalid"),
        (b"\xff\xfe\xfd", 400, "malformed"),
        (b"[" * 100_000, 400, "malformed"),
        (b"[]", 422, "invalid"),
        (b"null", 422, "invalid"),
        (b'"\\ud800"', 422, "invalid"),
        (b'{"recipe": "\\ud800"}', 422, "invalid"),
        (b'{"recipe": "digits-resnet", "params": {"\\ud800": 1}}', 422, "invalid"),
        (b'{"recipe": "digits-resnet", "labels": {"\\ud800": "x"}}', 422, "invalid"),
        (
            b'{"recipe": "digits-resnet", "config": {"max_trials": ' + b"9" * 5000 + b"}}",
            400,
            "malformed",
        ),
    ],
)
def test_odd_bodies_are_refused(
    body: bytes, status: int, slug: str, any_client: TestClient
) -> None:
    _check(any_client.post("/v1/jobs", content=body, headers=JSON), status, slug or "malformed")


@pytest.mark.parametrize("levels", [101, 300, 900])
@pytest.mark.parametrize(("begin", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_parameters_may_not_nest_without_end(
    levels: int, begin: bytes, end: bytes, any_client: TestClient
) -> None:
    deep = begin * levels + b"1" + end * levels
    body = b'{"recipe": "digits-resnet", "params": {"epochs": %b}}' % deep
    answer = any_client.post("/v1/jobs", content=body, headers=JSON)
    _check(answer, 422, "invalid")
    (error,) = answer.json()["errors"]
    assert error["pointer"] == "/params"
    assert "nest deeper than 100 levels" in error["detail"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_json_is_refused(media_type: str, any_client: TestClient) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    _check(
        any_client.post("/v1/jobs", content=b"{}", headers=headers), 415, "unsupported-media-type"
    )


def test_json_may_name_its_encoding(any_client: TestClient) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    answer = any_client.post("/v1/jobs", content=b'{"recipe": "char-lm"}', headers=headers)
    assert answer.status_code == 202


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/jobs/", "/docs", "/redoc", "/v1/jobs/a:b"]
)
def test_an_unknown_route_is_not_found(path: str, any_client: TestClient) -> None:
    _check(any_client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/jobs", "GET, POST"),
        ("OPTIONS", "/v1/jobs", "GET, POST"),
        ("PUT", f"/v1/jobs/{'0' * 26}", "GET"),
        ("GET", f"/v1/jobs/{'0' * 26}:cancel", "POST"),
        ("POST", f"/v1/jobs/{'0' * 26}/artifacts/x", "GET, HEAD"),
        ("POST", "/healthz", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(
    method: str, path: str, allowed: str, any_client: TestClient
) -> None:
    answer = any_client.request(method, path, headers=JSON)
    _check(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == allowed


def test_a_bug_tells_the_log_and_nobody_else(
    broken: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = broken.get("/bug")
    _check(answer, 500, "internal-error")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    incident = answer.json()["incident"]
    (logged,) = [entry for entry in caplog.records if incident in entry.getMessage()]
    assert logged.exc_info is not None
    assert "the secret is 42" in str(logged.exc_info[1])


def test_any_other_http_error_is_a_problem(broken: TestClient) -> None:
    answer = broken.get("/teapot")
    _check(answer, 418, "i'm-a-teapot")
    assert answer.json()["detail"] == "short and stout"


def test_who_is_too_fast_is_told_when_to_come_again(broken: TestClient) -> None:
    answer = broken.get("/busy")
    _check(answer, 429, "rate-limited")
    assert answer.headers["retry-after"] == "7"


def test_who_has_no_token_is_told_how_to_send_one(client_of: Callable[..., TestClient]) -> None:
    plain = client_of()
    answer = plain.get("/v1/jobs")
    _check(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    _check(plain.get("/v1/jobs", headers={"Authorization": "Bearer no"}), 401, "unauthenticated")
    _check(plain.post("/v1/jobs", json=BODY), 401, "unauthenticated")


def test_a_database_that_is_gone_is_told(app: FastAPI, client: TestClient) -> None:
    database = app.state.services.database
    database.engine.dispose()
    if not database.is_sqlite:
        pytest.skip("another test does this with a server of its own")
    path = database.engine.url.database
    with open(path, "r+b") as file:
        file.write(b"this is no database" * 100)
    _check(client.get("/v1/jobs"), 503, "database-unavailable")
    _check(client.get("/readyz"), 503, "database-unavailable")
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("keeps_folder", [True, False])
def test_a_file_that_was_deleted_takes_no_jobs(keeps_folder: bool, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with LocalClient(create_app(on_sqlite(folder)), raise_server_exceptions=False) as client:
        assert client.post("/v1/jobs", json=BODY).status_code == 202
        shutil.rmtree(folder)
        if keeps_folder:
            folder.mkdir()
        _check(client.post("/v1/jobs", json=BODY), 503, "database-unavailable")
        _check(client.get("/v1/jobs"), 503, "database-unavailable")
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
