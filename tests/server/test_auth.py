"""Every route asks who calls, unless it is marked as one for everybody."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from starlette.routing import Mount, Route

from server.app import create_app
from server.auth import LOCAL, SAFE_METHODS, Caller, Scope, is_loopback, needs_token
from server.db import Database
from server.settings import Settings
from tests.server.access import LocalClient, app_of, bearer, guarded, on_sqlite

# Those that were agreed on: another one that is marked as public must be added here, too.
PUBLIC_ROUTES = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/login"),
    ("POST", "/login"),
}
PLAIN_ROUTES = {"/openapi.json", "/static"}  # not of FastAPI, so that dependencies do not hold
NEEDS_NO_SCOPE = {("POST", "/logout")}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with guarded(on_sqlite(tmp_path_factory.mktemp("auth"))) as client:
        yield client


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Return the method and the template of everything that FastAPI routes."""
    return sorted(
        (method, context.path)
        for context in iter_route_contexts(app.router.routes)
        if not isinstance(context.original_route, Mount) and context.path not in PLAIN_ROUTES
        for method in context.methods
    )


def call(client: TestClient, method: str, template: str, headers: dict[str, str]) -> int:
    path = re.sub(r"\{[^}]*\}", "01k9yv6mzj8x7w3c5r2q4t0abd", template)
    kind = "application/octet-stream" if template == "/v1/assets" else "application/json"
    if method not in SAFE_METHODS:
        headers = headers | {"Content-Type": kind}
    with client.stream(method, path, headers=headers, content=b"{}") as answer:
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")
        return answer.status_code


def test_all_that_is_routed_is_walked(client: TestClient) -> None:
    found = routes(app_of(client))
    assert ("POST", "/v1/jobs") in found
    assert len(found) > 20
    for route in app_of(client).router.routes:
        if type(route) in (Route, Mount):
            assert route.path in PLAIN_ROUTES


def test_without_a_token_there_is_nothing_but_what_is_public(client: TestClient) -> None:
    open_ones = {
        (method, path)
        for method, path in routes(app_of(client))
        if call(client, method, path, {}) != 401
    }
    assert open_ones <= PUBLIC_ROUTES
    assert ("GET", "/healthz") in open_ones


@pytest.mark.parametrize("header", ["Bearer acc_wrong", "Bearer", "Basic dTpw", "", "Bearer ü"])
def test_what_is_no_token_opens_nothing(client: TestClient, header: str) -> None:
    headers = {"Authorization": header.encode()}
    assert client.get("/v1/jobs", headers=headers).status_code == 401  # type: ignore[arg-type]
    assert client.get("/healthz", headers=headers).status_code == 200  # type: ignore[arg-type]


def test_a_token_that_reads_changes_nothing(client: TestClient) -> None:
    reader = bearer(client, Scope.READ)
    changing = [one for one in routes(app_of(client)) if one[0] not in SAFE_METHODS]
    answers = {one: call(client, *one, reader) for one in changing if one not in PUBLIC_ROUTES}
    assert len(answers) > 5
    refused = {one for one, status in answers.items() if status == 403}
    assert answers.keys() - refused <= NEEDS_NO_SCOPE


def test_only_an_admin_sees_tokens(client: TestClient) -> None:
    submitter, admin = bearer(client, Scope.SUBMIT), bearer(client, Scope.ADMIN)
    assert client.get("/v1/tokens", headers=submitter).status_code == 403
    assert client.get("/v1/tokens", headers=admin).status_code == 200
    assert client.get("/v1/jobs", headers=submitter).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"\xff"])
def test_a_body_of_nobody_is_not_read(client: TestClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/jobs", content=body, headers=headers).status_code == 401
    headers |= bearer(client, Scope.SUBMIT)
    assert client.post("/v1/jobs", content=body, headers=headers).status_code == 400


def test_this_machine_needs_no_token_but_one_that_is_given_is_checked(tmp_path: Path) -> None:
    with LocalClient(create_app(on_sqlite(tmp_path))) as client:
        assert client.get("/v1/tokens").status_code == 200
        wrong = {"Authorization": "Bearer acc_wrong"}
        assert client.get("/v1/tokens", headers=wrong).status_code == 401
        assert client.get("/v1/tokens", headers=bearer(client, Scope.READ)).status_code == 403


def test_a_public_route_works_while_the_database_does_not(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = bearer(client, Scope.READ)
    tokens = app_of(client).state.services.tokens
    without_tables = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    monkeypatch.setattr(tokens, "_database", without_tables)
    assert client.get("/v1/jobs", headers=header).status_code == 503
    assert client.get("/healthz", headers=header).status_code == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("host", "auth", "expected"),
    [
        ("127.0.0.1", None, False),
        ("127.0.0.1", False, False),
        ("127.0.0.1", True, True),
        ("0.0.0.0", None, True),
        ("0.0.0.0", True, True),
    ],
)
def test_when_a_token_is_needed(host: str, auth: bool | None, expected: bool) -> None:
    assert needs_token(Settings(host=host, auth=auth)) is expected


@pytest.mark.parametrize(
    ("own", "allowed"),
    [
        (Scope.READ, {Scope.READ}),
        (Scope.SUBMIT, {Scope.READ, Scope.SUBMIT}),
        (Scope.ADMIN, {Scope.READ, Scope.SUBMIT, Scope.ADMIN}),
    ],
)
def test_what_a_scope_includes(own: Scope, allowed: set[Scope]) -> None:
    caller = Caller("someone", frozenset({own}))
    assert {scope for scope in Scope if caller.may(scope)} == allowed
    assert LOCAL.may(Scope.ADMIN)
