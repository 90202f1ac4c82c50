"""What the tests of the service share: both databases, an application, and a client of it."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import make_url

from server.app import create_app
from server.db import Database, upgrade
from server.jobs import Jobs
from server.settings import Settings

_VARIABLE = "ACCUTUNE_TEST_POSTGRES_URL"
_HERE = "postgresql://postgres@127.0.0.1:5432/postgres"

NewUrl = Callable[[], str]


@pytest.fixture(scope="session")
def postgres() -> str:
    """The URL of a PostgreSQL server, whose user may create databases."""
    url = os.environ.get(_VARIABLE, _HERE)
    try:
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.OperationalError as error:
        if _VARIABLE in os.environ:
            raise
        pytest.skip(f"no PostgreSQL at 127.0.0.1:5432, and {_VARIABLE} is not set: {error}")
    return url


class _Postgres:
    """Databases of a PostgreSQL server, made and dropped."""

    def __init__(self, url: str) -> None:
        self._url = url

    def create(self, template: str = "template1") -> str:
        name = f"t_{secrets.token_hex(8)}"
        self._run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def url_of(self, name: str) -> str:
        return make_url(self._url).set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "accutune.db"
    _upgraded(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def _postgres_template(postgres: str) -> Iterator[str]:
    server = _Postgres(postgres)
    name = server.create()
    try:
        _upgraded(server.url_of(name))
        yield name
    finally:
        server.drop(name)


def _upgraded(url: str) -> None:
    database = Database(url)
    try:
        upgrade(database)
    finally:
        database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables, of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server = _Postgres(request.getfixturevalue("postgres"))
    name = server.create()
    try:
        yield server.url_of(name)
    finally:
        server.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database with all tables, of either kind."""
    if request.param == "sqlite":
        path = tmp_path / "accutune.db"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server = _Postgres(request.getfixturevalue("postgres"))
    name = server.create(request.getfixturevalue("_postgres_template"))
    try:
        yield server.url_of(name)
    finally:
        server.drop(name)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with all tables, of either kind."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def jobs(database: Database) -> Jobs:
    """The queue."""
    return Jobs(database)


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Settings of a service for this machine alone, without a limit that tests would run into."""
    return Settings(
        data_dir=tmp_path / "data", database_url=database_url, requests_per_minute=1_000_000
    )


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    """The application."""
    return create_app(settings)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client of the running application; errors of the server are answers, not exceptions."""
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
