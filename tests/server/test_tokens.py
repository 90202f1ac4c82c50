"""Tokens: shown once, found by their digest, and of no use once expired or revoked."""

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update

from server.auth import Caller, Scope
from server.db import Database, upgrade
from server.db.models import TokenRow
from server.errors import DatabaseError, InvalidError, NotFoundError, SettingsError
from server.settings import Settings
from server.startup import check_exposure
from server.tokens import Tokens
from tests.server.access import bearer, guarded, on_sqlite

READ = (Scope.READ,)


@pytest.fixture
def tokens(database: Database) -> Tokens:
    return Tokens(database)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with guarded(settings) as client:
        yield client


def age(database: Database, token_id: str, **fields: Any) -> None:
    with database.writing() as session:
        session.execute(update(TokenRow).where(TokenRow.id == token_id).values(**fields))


def last_used(database: Database, token_id: str) -> datetime | None:
    with database.reading() as session:
        return session.scalars(select(TokenRow.last_used_at).where(TokenRow.id == token_id)).one()


def test_a_token_is_found_by_its_secret_alone(tokens: Tokens) -> None:
    row, secret = tokens.create("team", (Scope.SUBMIT, Scope.READ))
    assert tokens.find(secret) == Caller("team", frozenset({Scope.READ, Scope.SUBMIT}), row.id)
    for wrong in ("", "acc_", secret[:-1], secret + "x", secret.swapcase(), row.sha256, "x" * 300):
        assert tokens.find(wrong) is None


def test_a_secret_has_256_random_bits_and_is_not_stored(tokens: Tokens, database: Database) -> None:
    secrets = {tokens.create("team", READ)[1] for _ in range(20)}
    assert len(secrets) == 20
    assert all(secret.startswith("acc_") and len(secret) == 4 + 43 for secret in secrets)
    with database.reading() as session:
        stored = session.execute(text("SELECT * FROM tokens")).all()
    assert not any(secret in repr(stored) for secret in secrets)
    digests = {hashlib.sha256(secret.encode()).hexdigest() for secret in secrets}
    assert digests == {row.sha256 for row in stored}


def test_a_revoked_token_is_of_no_use(tokens: Tokens) -> None:
    row, secret = tokens.create("team", READ)
    other = tokens.create("team", READ)[1]
    first = tokens.revoke(row.id).revoked_at
    assert tokens.find(secret) is None
    assert tokens.of_id(row.id) is None
    assert tokens.find(other) is not None
    assert tokens.revoke(row.id).revoked_at == first
    with pytest.raises(NotFoundError):
        tokens.revoke("nothing")


def test_an_expired_token_is_of_no_use(tokens: Tokens, database: Database) -> None:
    soon = datetime.now(timezone(timedelta(hours=-7))) + timedelta(minutes=1)
    row, secret = tokens.create("team", READ, soon)
    assert row.expires_at == soon
    assert tokens.find(secret) is not None
    assert tokens.any_usable()
    age(database, row.id, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert tokens.find(secret) is None
    assert tokens.of_id(row.id) is None
    assert not tokens.any_usable()


@pytest.mark.parametrize(
    "expires",
    [
        datetime.now(UTC) - timedelta(seconds=1),
        datetime(9999, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-14))),
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
    ],
)
def test_a_time_that_cannot_be_is_refused(tokens: Tokens, expires: datetime) -> None:
    with pytest.raises(InvalidError):
        tokens.create("team", READ, expires)


@pytest.mark.parametrize("name", ["", "a\0b", "\udcff", "x" * 256])
def test_a_name_that_cannot_be_stored_is_refused(tokens: Tokens, name: str) -> None:
    with pytest.raises(InvalidError, match="is no name for a token"):
        tokens.create(name, READ)


def test_a_token_without_a_scope_is_refused(tokens: Tokens) -> None:
    with pytest.raises(InvalidError, match="read, submit, admin"):
        tokens.create("team", ())


def test_its_use_is_noted_at_most_once_a_minute(tokens: Tokens, database: Database) -> None:
    row, secret = tokens.create("team", READ)
    assert last_used(database, row.id) is None
    tokens.find(secret)
    first = last_used(database, row.id)
    assert first is not None
    tokens.find(secret)
    assert last_used(database, row.id) == first
    age(database, row.id, last_used_at=first - timedelta(minutes=2))
    tokens.find(secret)
    second = last_used(database, row.id)
    assert second is not None
    assert second > first


def test_a_database_that_only_reads_still_lets_in(
    tokens: Tokens, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tokens.create("team", READ)[1]

    def full() -> Any:
        raise DatabaseError("the disk is full")

    monkeypatch.setattr(database, "writing", full)
    assert tokens.find(secret) is not None


def test_tokens_are_listed_newest_first(tokens: Tokens) -> None:
    made = [tokens.create(f"team {number}", READ)[0].id for number in range(3)]
    made.sort(reverse=True)  # those of one millisecond have no order of their own
    listed = [row.id for row in tokens.list(2)]
    assert listed == made[:2]
    assert [row.id for row in tokens.list(2, before=listed[-1])] == made[2:]


def test_an_admin_makes_lists_and_revokes_tokens(client: TestClient) -> None:
    admin = bearer(client, Scope.ADMIN, name="root")
    body = {"name": "ci", "scopes": ["read"], "expires_at": "2999-01-01T00:00:00+01:00"}
    made = client.post("/v1/tokens", json=body, headers=admin)
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    token = made.json()
    reader = {"Authorization": f"Bearer {token.pop('token')}"}
    assert client.get("/v1/jobs", headers=reader).status_code == 200
    listed = client.get("/v1/tokens", headers=admin).json()["items"]
    assert [one["name"] for one in listed] == ["ci", "root"]
    assert not any("token" in one or "sha256" in one for one in listed)
    assert token["expires_at"] == "2998-12-31T23:00:00Z"
    path = f"/v1/tokens/{token['id']}"
    assert client.delete(path, headers=admin).status_code == 204
    assert client.get("/v1/jobs", headers=reader).status_code == 401
    assert client.delete(f"/v1/tokens/{'0' * 26}", headers=admin).status_code == 404


def test_tokens_are_listed_in_pages(client: TestClient) -> None:
    admin = bearer(client, Scope.ADMIN)
    for number in range(4):
        body = {"name": f"n{number}", "scopes": ["read"]}
        client.post("/v1/tokens", json=body, headers=admin)
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        query = {"limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/tokens", params=query, headers=admin).json()
        seen += [one["id"] for one in page["items"]]
        cursor = page["next_cursor"]
    assert len(seen) == len(set(seen)) == 5


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client with a token that may do everything."""
    with guarded(on_sqlite(tmp_path_factory.mktemp("tokens"))) as client:
        client.headers.update(bearer(client, Scope.ADMIN))
        yield client


@pytest.mark.parametrize(
    "body",
    [
        {"name": "", "scopes": ["read"]},
        {"name": "a\x00", "scopes": ["read"]},
        {"name": "a", "scopes": []},
        {"name": "a", "scopes": ["root"]},
        {"name": "a", "scopes": ["read"], "expires_at": "2999-01-01T00:00:00"},
        {"name": "a", "scopes": ["read"], "expires_at": "2001-01-01T00:00:00Z"},
        {"name": "a", "scopes": ["read"], "expires_at": "9999-12-31T23:59:59-14:00"},
        {"name": "a", "scopes": ["read"], "secret": "mine"},
    ],
)
def test_a_token_that_cannot_be_is_refused(admin: TestClient, body: dict[str, Any]) -> None:
    answer = admin.post("/v1/tokens", json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def nothing(tokens: Tokens) -> None:
    """Leave the tokens as they are."""


def usable(tokens: Tokens) -> None:
    tokens.create("team", READ)


def revoked(tokens: Tokens) -> None:
    tokens.revoke(tokens.create("team", READ)[0].id)


@pytest.mark.parametrize(
    ("host", "auth", "prepare", "may_start"),
    [
        ("127.0.0.1", None, nothing, True),
        ("127.0.0.1", False, nothing, True),
        ("0.0.0.0", None, nothing, False),
        ("0.0.0.0", None, revoked, False),
        ("0.0.0.0", None, usable, True),
        ("0.0.0.0", True, usable, True),
        ("0.0.0.0", False, usable, False),
        ("::", None, nothing, False),
    ],
)
def test_what_others_can_reach_does_not_start_unguarded(
    tmp_path: Path,
    host: str,
    auth: bool | None,
    prepare: Callable[[Tokens], None],
    may_start: bool,
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'accutune.db'}")
    upgrade(database)
    tokens = Tokens(database)
    prepare(tokens)
    settings = Settings(host=host, auth=auth)
    if may_start:
        check_exposure(settings, tokens)
        return
    with pytest.raises(SettingsError, match="tuner token create"):
        check_exposure(settings, tokens)
