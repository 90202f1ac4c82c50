"""Connections to the service's database: transactions that read, and transactions that write."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, exc, func, make_url, select
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from server.errors import DatabaseError, SettingsError

_LOCK_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5
_WRITES = "accutune_writes"


class Database:
    """One database, SQLite or PostgreSQL; thread-safe.

    On SQLite a writing transaction takes the lock when it begins, so that it never fails half way
    because another one wrote in between.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(**{_WRITES: True})

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that only reads."""
        with _errors(), Session(self.engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Give a session that is committed at the end, and rolled back after an exception."""
        with _errors(), Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()


def now(session: Session) -> datetime:
    """Return the database's time, the one clock that all workers share."""
    if session.get_bind().dialect.name == "sqlite":  # one host: its own clock
        return datetime.now(UTC)
    moment: datetime = session.scalars(select(func.clock_timestamp())).one()
    return moment.astimezone(UTC)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what says that the database is not there, is locked or full into a DatabaseError."""
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        cause = " ".join(str(error.orig).split())
        raise DatabaseError(f"the database cannot be used: {cause}") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise DatabaseError("the connection to the database was lost") from error
        if type(error) is exc.DatabaseError:  # none of its kinds: SQLite's file is damaged
            raise DatabaseError(f"the database cannot be used: {error.orig}") from error
        raise


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.drivername.startswith("sqlite"):
        if parsed.database:
            _make_folder(Path(parsed.database).parent)
        arguments: dict[str, Any] = {"timeout": _LOCK_TIMEOUT_S, "check_same_thread": False}
        engine = create_engine(parsed, connect_args=arguments)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        if parsed.database and not parsed.database.startswith((":memory:", "file:")):
            event.listen(engine, "checkout", partial(_check_file, Path(parsed.database)))
        return engine
    parsed = parsed.set(drivername="postgresql+psycopg")
    arguments = {"connect_timeout": _CONNECT_TIMEOUT_S}
    try:
        return create_engine(
            parsed, connect_args=arguments, pool_pre_ping=True, pool_size=10, max_overflow=30
        )
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"PostgreSQL needs a package that is missing ({error}): install accutune[postgres]"
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"the database's folder cannot be made: {error}") from error


def _prepare_sqlite(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _check_file(path: Path, *_: object) -> None:
    """Refuse a connection to a file that was deleted: what is written to it is lost."""
    if not path.exists():
        raise DisconnectionError(f"the file {path} is gone")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
