"""Where studies and their trials are kept: SQLAlchemy tables, and StudyStore over them."""

import json
import re
import secrets
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from sqlalchemy import (
    JSON,
    URL,
    DateTime,
    Engine,
    ForeignKey,
    MetaData,
    NullPool,
    Pool,
    StaticPool,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry

from tuner.errors import StorageError, StudyMismatchError
from tuner.storage_errors import patiently, shown

T = TypeVar("T")

_LOCK_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5
_NAME_LENGTH = 255
_MEMORY = "sqlite://"
_DRIVERS = {
    "sqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_URL_HINT = "give sqlite:///tuning.db or postgresql://user:password@host/database"


def _now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """The one metadata of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class StudyRow(Base):
    """One study: what it searches (`header`), and what is computed once for it (`payload`)."""

    __tablename__ = "studies"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME_LENGTH), unique=True)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=_now)
    header: Mapped[dict[str, Any]] = mapped_column(JSON)
    payload: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class TrialRow(Base):
    """One trial of a study; number 0 is the baseline."""

    __tablename__ = "trials"
    __table_args__ = (UniqueConstraint("study_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("studies.id", ondelete="CASCADE"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=_now)
    record: Mapped[dict[str, Any]] = mapped_column(JSON)


_TABLES = [cast(Table, row.__table__) for row in (StudyRow, TrialRow)]  # others may share Base
Guard = Callable[[Session, int, Mapping[str, Any]], None]
Fence = Callable[[Session], None]


@dataclass(frozen=True)
class Storage:
    """A database, what runs in the transactions that write to it, and how long to wait for it.

    `guard(session, number, record)` runs before a trial is stored and may write to other tables,
    so that both are stored or none; `fence(session)` runs before the study itself and what belongs
    to it are stored. What either raises goes on as it is, and nothing is stored. While the database
    is away, locked or full, every access is tried again for `patience_s` seconds.
    """

    url: str
    guard: Guard | None = None
    fence: Fence | None = None
    patience_s: float = 0.0


@dataclass(frozen=True)
class StudyHeader:
    """What must be the same for a study to be resumed.

    `model` and `space` are signatures (hashes or short descriptions) of the model and of the
    options that are searched; `versions` names what else results depend on: the runtime and the
    processor that times were taken on.
    """

    model: str
    space: str
    strategy: str
    seed: int
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON."""
        return {
            "model": self.model,
            "space": self.space,
            "strategy": self.strategy,
            "seed": self.seed,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StudyHeader":
        """Read what `to_dict` wrote."""
        return cls(**data)


class StudyStore:
    """Keeps one study's trials as they end, one commit each.

    Opened without a URL it keeps them in memory, so that they end with it, and has the same
    methods. Every error of the database is a StorageError; what was added before it stays.
    """

    def __init__(
        self, engine: Engine, study_id: int, name: str, resumed: bool, storage: Storage
    ) -> None:
        self.name = name
        self.resumed = resumed
        self._engine = engine
        self._study_id = study_id
        self._storage = storage

    @classmethod
    def open(
        cls, storage: Storage | str | None, name: str | None, header: StudyHeader
    ) -> "StudyStore":
        """Create the study of this name, or resume it if its header is the same.

        A URL is `sqlite:///path` or `postgresql://user:password@host/database`; a `name` of None
        makes one up. Raises StorageError where the database cannot be used, and where the stored
        header differs, naming each difference.
        """
        name = f"study-{secrets.token_hex(4)}" if name is None else _checked_name(name)
        if not isinstance(storage, Storage):
            storage = Storage(_MEMORY if storage is None else storage)
        engine = _engine(_parsed(storage.url))

        def opened() -> tuple[int, bool]:
            _create_tables(engine)
            return _create_or_resume(engine, name, header, storage.fence)

        try:
            study_id, resumed = patiently(opened, engine, storage.patience_s)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, study_id, name, resumed, storage)

    def records(self) -> list[dict[str, Any]]:
        """Return the stored records in the order of their numbers, the baseline's first."""
        query = select(TrialRow.record).where(TrialRow.study_id == self._study_id)

        def read() -> list[dict[str, Any]]:
            with Session(self._engine) as session:
                return list(session.scalars(query.order_by(TrialRow.number)))

        return self._patiently(read)

    def add(self, number: int, record: Mapping[str, Any]) -> None:
        """Store the record of this trial; a number that is taken is a StorageError."""
        checked = _checked_json(f"trial {number}", record)
        tries = 0

        def stored() -> None:
            nonlocal tries
            tries += 1
            with Session(self._engine) as session, session.begin():
                if self._storage.guard is not None:
                    self._storage.guard(session, number, checked)
                session.add(self._row(number, checked))

        try:
            self._patiently(stored)
        except IntegrityError as error:
            # A connection that broke at the commit leaves open whether it was done.
            if tries == 1 or self._record(number) != checked:
                raise self._refused(number, error) from error

    @property
    def payload(self) -> dict[str, Any]:
        """What `set_payload` stored; empty until then."""
        query = select(StudyRow.payload).where(StudyRow.id == self._study_id)

        def read() -> dict[str, Any]:
            with Session(self._engine) as session:
                payload: dict[str, Any] = session.scalars(query).one()
                return payload

        return self._patiently(read)

    def set_payload(self, payload: Mapping[str, Any]) -> None:
        """Store what is computed once for a study, such as predicted damages."""
        checked = _checked_json("the payload", payload)

        def stored() -> None:
            with Session(self._engine) as session, session.begin():
                if self._storage.fence is not None:
                    self._storage.fence(session)
                session.get_one(StudyRow, self._study_id).payload = checked

        self._patiently(stored)

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _patiently(self, access: Callable[[], T]) -> T:
        return patiently(access, self._engine, self._storage.patience_s)

    def _row(self, number: int, record: dict[str, Any]) -> TrialRow:
        state = str(record.get("state", "complete"))
        return TrialRow(study_id=self._study_id, number=number, state=state, record=record)

    def _record(self, number: int) -> dict[str, Any] | None:
        mine = (TrialRow.study_id == self._study_id, TrialRow.number == number)

        def read() -> dict[str, Any] | None:
            with Session(self._engine) as session:
                return session.scalars(select(TrialRow.record).where(*mine)).one_or_none()

        return self._patiently(read)

    def _refused(self, number: int, error: IntegrityError) -> StorageError:
        if "foreign key" in str(error.orig).lower():
            return StorageError(
                f"study {self.name!r} was deleted while it ran: trial {number} cannot be stored"
            )
        return StorageError(
            f"trial {number} of study {self.name!r} is stored already: another process is running "
            "this study. Wait for it to end, or choose another study_name"
        )


def _checked_name(name: str) -> str:
    if not 0 < len(name) <= _NAME_LENGTH or "\0" in name:
        raise StorageError(
            f"study_name {name[:40]!r} has {len(name)} characters: give 1 to {_NAME_LENGTH}, "
            "without a null character"
        )
    return name


def _checked_json(what: str, data: Mapping[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"{what} of a study cannot be stored, it is not strict JSON: {error}. "
            'Write NaN and ±inf as the strings "nan", "inf" and "-inf"'
        ) from error
    return dict(data)


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        shown = re.sub(r"://.*@", "://***@", url)
        raise StorageError(f"storage {shown!r} is not a database URL: {_URL_HINT}") from error
    if parsed.drivername not in _DRIVERS:
        raise StorageError(f"storage of the kind {parsed.drivername!r} is not known: {_URL_HINT}")
    return parsed.set(drivername=_DRIVERS[parsed.drivername])


def _engine(url: URL) -> Engine:
    """Return an engine that keeps no connection open between trials (except in memory)."""
    arguments, pool = _connection_of(url)
    try:
        engine = create_engine(url, poolclass=pool, connect_args=arguments)
    except ImportError as error:
        raise StorageError(
            f"PostgreSQL needs a driver ({error}): pip install 'accutune[postgres]'"
        ) from error
    except ArgumentError as error:
        shown = url.render_as_string(hide_password=True)
        raise StorageError(f"storage {shown} cannot be used: {_URL_HINT}") from error
    if url.drivername == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _connection_of(url: URL) -> tuple[dict[str, Any], type[Pool]]:
    """Return the connection's arguments that the URL itself does not give, and the pool."""
    if url.drivername != "sqlite":
        given = "connect_timeout" in url.query
        return ({} if given else {"connect_timeout": _CONNECT_TIMEOUT_S}), NullPool
    arguments: dict[str, Any] = {} if "timeout" in url.query else {"timeout": _LOCK_TIMEOUT_S}
    if url.database in (None, "", ":memory:"):
        return arguments | {"check_same_thread": False}, StaticPool
    return arguments, NullPool


def _prepare_sqlite(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    if connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete":
        connection.execute("PRAGMA journal_mode = WAL")


def _create_tables(engine: Engine) -> None:
    try:
        Base.metadata.create_all(engine, _TABLES)
    except DBAPIError as error:
        # Another process may have created them between the look and the creation.
        if not any(words in str(error.orig) for words in ("already exists", "duplicate key")):
            raise
        Base.metadata.create_all(engine, _TABLES)
    found = inspect(engine)
    for table in _TABLES:
        missing = set(table.columns.keys()) - {c["name"] for c in found.get_columns(table.name)}
        if missing:
            raise StorageError(
                f"{shown(engine)} has a table {table.name!r} of another program (without "
                f"{', '.join(sorted(missing))}): choose another database"
            )


def _create_or_resume(
    engine: Engine, name: str, header: StudyHeader, fence: Fence | None
) -> tuple[int, bool]:
    """Return the study's id and whether it was there before."""
    try:
        with Session(engine) as session, session.begin():
            if fence is not None:
                fence(session)
            row = session.scalars(select(StudyRow).where(StudyRow.name == name)).one_or_none()
            if row is None:
                row = StudyRow(name=name, header=header.to_dict())
                session.add(row)
                session.flush()
                return row.id, False
            _check_header(name, row.header, header.to_dict())
            return row.id, True
    except IntegrityError:
        # Another process created it in between: now it is there to be resumed.
        return _create_or_resume(engine, name, header, fence)


def _check_header(name: str, stored: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    old, new = _flat(stored), _flat(ours)
    differences = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise StudyMismatchError(
            f"study {name!r} cannot be resumed, it was made with others: {'; '.join(differences)}. "
            "Choose another study_name, or run with what it was made with"
        )


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
    versions = {f"version of {name}": v for name, v in header.get("versions", {}).items()}
    return {key: value for key, value in header.items() if key != "versions"} | versions
