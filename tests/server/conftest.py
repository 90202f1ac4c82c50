"""What the tests of the service share: both databases, an application, and a client of it."""

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import make_url

from server import logs
from server.app import create_app
from server.auth import Scope
from server.db import Database, upgrade
from server.db.models import Base
from server.jobs import Jobs
from server.settings import Settings
from tests.server.access import LocalClient
from tests.server.clusters import running_cluster

_VARIABLE = "ACCUTUNE_TEST_POSTGRES_URL"
_HERE = "postgresql://postgres@127.0.0.1:5432/postgres"

NewUrl = Callable[[], str]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that lets databases be made; a temporary one if need be."""
    url = os.environ.get(_VARIABLE, _HERE)
    try:
        psycopg.connect(url, connect_timeout=3).close()
    except psycopg.OperationalError:
        if _VARIABLE in os.environ:
            raise
        with running_cluster() as cluster:
            yield cluster.url
    else:
        yield url


class _Postgres:
    """Databases of a PostgreSQL server, made and dropped."""

    def __init__(self, url: str) -> None:
        self._url = url

    def create(self) -> str:
        name = f"t_{secrets.token_hex(8)}"
        self._run(f"CREATE DATABASE {name}")
        self._run(f"ALTER DATABASE {name} SET synchronous_commit = off")  # a test survives no crash
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
def _postgres_tables(postgres: str) -> Iterator[str]:
    """One database for all tests: to make and drop one takes seconds on a busy machine."""
    server = _Postgres(postgres)
    name = server.create()
    try:
        _upgraded(server.url_of(name))
        yield server.url_of(name)
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
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database with all tables, which are empty, of either kind."""
    if request.param == "sqlite":
        path = tmp_path / "accutune.db"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        return f"sqlite:///{path}"
    url: str = request.getfixturevalue("_postgres_tables")
    with psycopg.connect(url, options="-c lock_timeout=20s") as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(f"DELETE FROM {table.name}".encode())
    return url


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
    with LocalClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def any_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client for what no database sees: one for many tests, that leave jobs behind."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"), requests_per_minute=1_000_000)
    with LocalClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client_of(settings: Settings) -> Iterator[Callable[..., TestClient]]:
    """Make clients of a service where everybody needs a token, each with its own."""
    guarded = create_app(settings.model_copy(update={"auth": True}))
    with LocalClient(guarded, raise_server_exceptions=False) as plain:
        tokens = guarded.state.services.tokens

        def make(name: str | None = None, *scopes: Scope) -> TestClient:
            if name is None:
                return plain
            _, secret = tokens.create(name, scopes or (Scope.SUBMIT,))
            headers = {"Authorization": f"Bearer {secret}"}
            return LocalClient(guarded, raise_server_exceptions=False, headers=headers)

        yield make


@pytest.fixture
def live(app: FastAPI) -> Iterator[str]:
    """The address of a server that really listens, for what a test client cannot do: streams."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def plain_root() -> Iterator[logging.Logger]:
    """The root logger, put back to what it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in logs._QUIET}
    yield root
    root.handlers[:], root.level = handlers, level
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)
    logging.getLogger("uvicorn.access").disabled = False
    logging.captureWarnings(False)
