"""The dashboard's sessions: opened by a token, signed, and of no use without their CSRF token."""

import time
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path

import pytest
from fastapi import Depends, Request, Response
from fastapi.testclient import TestClient

from server.app import create_app
from server.auth import CSRF_FIELD, CSRF_HEADER, SESSION_COOKIE, Scope, require
from server.db import Database, upgrade
from server.errors import SettingsError
from server.sessions import Sessions
from server.settings import Settings
from server.tokens import Tokens
from tests.server.access import LocalClient, on_sqlite

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return on_sqlite(tmp_path, session_hours=2, auth=True)


@pytest.fixture
def tokens(settings: Settings) -> Iterator[Tokens]:
    database = Database(settings.database)
    upgrade(database)
    yield Tokens(database)
    database.close()


@pytest.fixture
def sessions(settings: Settings, tokens: Tokens) -> Sessions:
    return Sessions(settings, tokens)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """A client of the service with a form added."""
    app = create_app(settings)

    @app.post("/form", dependencies=[Depends(require(Scope.SUBMIT))])
    async def form(request: Request) -> list[str]:
        return sorted(await request.form())

    with LocalClient(app, raise_server_exceptions=False) as client:
        yield client


def opened(sessions: Sessions, tokens: Tokens, *scopes: Scope) -> tuple[str, str]:
    """Open a session; return the id of its token, and its cookie's value."""
    row, secret = tokens.create("someone", scopes or (Scope.READ,))
    response = Response()
    assert sessions.login(response, secret, secure=False) is not None
    return row.id, SimpleCookie(response.headers["set-cookie"])[SESSION_COOKIE].value


def test_a_session_stands_for_its_token(sessions: Sessions, tokens: Tokens) -> None:
    token_id, value = opened(sessions, tokens)
    caller = sessions.find(value)
    assert caller is not None
    assert (caller.owner, caller.token_id) == ("someone", token_id)
    assert caller.scopes == {Scope.READ}


@pytest.mark.parametrize("secure", [False, True])
def test_the_cookie_is_for_this_site_and_not_for_scripts(
    sessions: Sessions, tokens: Tokens, secure: bool
) -> None:
    response = Response()
    sessions.login(response, tokens.create("someone", (Scope.READ,))[1], secure)
    morsel = SimpleCookie(response.headers["set-cookie"])[SESSION_COOKIE]
    assert morsel["httponly"] is True
    assert morsel["samesite"] == "strict"
    assert bool(morsel["secure"]) is secure
    assert morsel["path"] == "/"
    assert morsel["domain"] == ""
    assert morsel["max-age"] == str(2 * 3600)


def test_what_is_no_token_opens_no_session(sessions: Sessions, tokens: Tokens) -> None:
    response = Response()
    assert sessions.login(response, "acc_wrong", secure=False) is None
    assert "set-cookie" not in response.headers


def test_a_session_ends_with_its_token(sessions: Sessions, tokens: Tokens) -> None:
    token_id, value = opened(sessions, tokens)
    tokens.revoke(token_id)
    assert sessions.find(value) is None


def test_a_session_ends_by_itself(
    sessions: Sessions, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, value = opened(sessions, tokens)
    begun = time.time()
    monkeypatch.setattr(time, "time", lambda: begun + 2 * 3600 - 5)
    assert sessions.find(value) is not None
    monkeypatch.setattr(time, "time", lambda: begun + 2 * 3600 + 5)
    assert sessions.find(value) is None


def test_a_forged_session_is_none(sessions: Sessions, tokens: Tokens) -> None:
    token_id, value = opened(sessions, tokens)
    other_id, _ = opened(sessions, tokens, Scope.ADMIN)
    _, end, nonce, signature = value.removeprefix("ses_").split(".")
    forged = [
        "",
        "ses_",
        "ses_...",
        value[:-1],
        value + "0",
        value.removeprefix("ses_"),
        f"ses_{other_id}.{end}.{nonce}.{signature}",
        f"ses_{token_id}.{int(end) + 1}.{nonce}.{signature}",
        f"ses_{token_id}.{end}.{nonce}.",
        f"ses_{token_id}.{end}.{nonce}.{sessions.csrf_token(value)}",
        f"ses_{token_id}.{end}.{nonce}.\udcff",
        "ses_" + "9" * 5000,
    ]
    for one in forged:
        assert sessions.find(one) is None
    assert sessions.find(value) is not None


def test_the_key_is_kept_and_nobody_elses(
    sessions: Sessions, tokens: Tokens, settings: Settings
) -> None:
    _, value = opened(sessions, tokens)
    key = settings.data_dir / "session.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    assert Sessions(settings, tokens).find(value) is not None
    assert [path.name for path in settings.data_dir.glob("session*")] == ["session.key"]
    key.unlink()
    assert Sessions(settings, tokens).find(value) is None


def test_a_damaged_key_is_told(sessions: Sessions, tokens: Tokens, settings: Settings) -> None:
    (settings.data_dir / "session.key").write_bytes(b"short")
    with pytest.raises(SettingsError, match=r"session\.key"):
        opened(sessions, tokens)


def test_a_csrf_token_is_that_of_one_session(sessions: Sessions, tokens: Tokens) -> None:
    (_, one), (_, other) = opened(sessions, tokens), opened(sessions, tokens)
    assert sessions.is_csrf_token(one, sessions.csrf_token(one))
    for wrong in ("", "x", "\udcff", sessions.csrf_token(other), sessions.csrf_token(one)[:-1]):
        assert not sessions.is_csrf_token(one, wrong)


def log_in(client: TestClient, *scopes: Scope) -> str:
    """Give the client a session; return its CSRF token."""
    services = client.app.state.services  # type: ignore[attr-defined]
    _, value = opened(services.sessions, services.tokens, *scopes)
    client.cookies.set(SESSION_COOKIE, value)
    return str(services.sessions.csrf_token(value))


def test_a_session_reads(client: TestClient) -> None:
    assert client.get("/v1/jobs").status_code == 401
    log_in(client)
    assert client.get("/v1/jobs").status_code == 200


def test_a_session_that_ended_reads_nothing(client: TestClient) -> None:
    client.cookies.set(SESSION_COOKIE, "ses_a.1.b.c")
    answer = client.get("/v1/jobs")
    assert answer.status_code == 401
    assert "log in again" in answer.json()["detail"]


def test_a_session_changes_things_with_its_csrf_token_only(client: TestClient) -> None:
    csrf = log_in(client, Scope.SUBMIT)
    path = "/v1/assets/" + "0" * 64
    assert client.delete(path).status_code == 403
    assert client.delete(path, headers={CSRF_HEADER: "wrong"}).status_code == 403
    assert client.delete(path, headers={CSRF_HEADER: csrf}).status_code == 404


def test_a_form_carries_the_csrf_token_in_a_field(client: TestClient) -> None:
    csrf = log_in(client, Scope.SUBMIT)
    assert client.post("/form", data={"a": "1"}).status_code == 403
    assert client.post("/form", data={"a": "1", CSRF_FIELD: "wrong"}).status_code == 403
    answer = client.post("/form", data={"a": "1", CSRF_FIELD: csrf})
    assert (answer.status_code, answer.json()) == (200, ["a", CSRF_FIELD])


def test_a_session_is_no_more_than_its_scopes(client: TestClient) -> None:
    csrf = log_in(client, Scope.READ)
    assert client.post("/form", data={CSRF_FIELD: csrf}).status_code == 403
    assert client.post("/form", data={CSRF_FIELD: csrf}).json()["type"].endswith(":forbidden")


def test_a_bearer_token_needs_no_csrf_token_beside_a_session(client: TestClient) -> None:
    log_in(client, Scope.SUBMIT)
    services = client.app.state.services  # type: ignore[attr-defined]
    _, secret = services.tokens.create("someone", (Scope.SUBMIT,))
    headers = {"Authorization": f"Bearer {secret}"}
    assert client.delete("/v1/assets/" + "0" * 64, headers=headers).status_code == 404


def test_logging_out_takes_the_cookie_back(sessions: Sessions) -> None:
    response = Response()
    sessions.logout(response, secure=False)
    morsel = SimpleCookie(response.headers["set-cookie"])[SESSION_COOKIE]
    assert (morsel.value, morsel["max-age"]) == ("", "0")
