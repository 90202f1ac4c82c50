"""The tables of the service; studies and trials are the library's own (tuner.storage)."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.orm import Mapped, mapped_column

from tuner.storage import Base

__all__ = [
    "ArtifactRow",
    "AssetOwnerRow",
    "AssetRow",
    "Base",
    "EventRow",
    "IdempotencyRow",
    "JobRow",
    "OpRow",
    "TokenRow",
    "WorkerRow",
]

_ID = String(26)
_NAME = String(255)
# SQLite counts up by itself only where the type is INTEGER
_SERIAL = BigInteger().with_variant(Integer, "sqlite")


class Utc(TypeDecorator[datetime]):
    """A moment, always with UTC as its zone; SQLite itself keeps none."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Add the zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class JobRow(Base):
    """One job. Only server.jobs writes here.

    `fence` grows with every claim: a worker may write only while it is what the worker claimed
    with. `attempt` grows only after a crash. `version` grows with every change.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_queue", "state", "owner", "priority", "id"),
        Index("ix_jobs_lease", "state", "lease_until"),
        Index("ix_jobs_owner", "owner", "id"),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    recipe: Mapped[str] = mapped_column(_NAME)
    params: Mapped[dict[str, Any]] = mapped_column(JSON)
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    priority: Mapped[int] = mapped_column(default=0)
    labels: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    max_attempts: Mapped[int] = mapped_column(default=3)
    timeout_s: Mapped[float | None]
    owner: Mapped[str] = mapped_column(_NAME)
    state: Mapped[str] = mapped_column(String(16))
    version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime] = mapped_column(Utc)
    started_at: Mapped[datetime | None] = mapped_column(Utc)
    finished_at: Mapped[datetime | None] = mapped_column(Utc)

    attempt: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(_ID)
    claimed_at: Mapped[datetime | None] = mapped_column(Utc)
    lease_until: Mapped[datetime | None] = mapped_column(Utc)
    spent_s: Mapped[float] = mapped_column(default=0.0)

    study_name: Mapped[str] = mapped_column(_NAME)
    trials: Mapped[int] = mapped_column(default=0)
    baseline: Mapped[float | None]
    best: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    goal_met: Mapped[bool | None]
    quantized_ops: Mapped[int | None]
    stop_reason: Mapped[str | None] = mapped_column(String(32))
    error: Mapped[str | None] = mapped_column(Text)


class EventRow(Base):
    """Something that happened to a job; the ids of one job's events grow in the order of commit."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job", "job_id", "id"),)

    id: Mapped[int] = mapped_column(_SERIAL, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(Utc)


class OpRow(Base):
    """One row of the op table of a job's best plan, as tuner.records.OpSummary writes it."""

    __tablename__ = "job_ops"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    summary: Mapped[dict[str, Any]] = mapped_column(JSON)


class ArtifactRow(Base):
    """A file that a job left in the artifacts folder."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(_NAME, primary_key=True)
    media_type: Mapped[str] = mapped_column(_NAME)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(Utc)


class IdempotencyRow(Base):
    """The job that an Idempotency-Key of an owner stands for, and a digest of its body."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(_NAME, primary_key=True)
    key: Mapped[str] = mapped_column(_NAME, primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(Utc)


class WorkerRow(Base):
    """A worker process, on this host or another; gone once its heartbeat is old."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    host: Mapped[str] = mapped_column(_NAME)
    pid: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    slots: Mapped[int] = mapped_column(default=1)
    gpus: Mapped[list[str]] = mapped_column(JSON, default=list)
    version: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime] = mapped_column(Utc)
    heartbeat_at: Mapped[datetime] = mapped_column(Utc)


class TokenRow(Base):
    """An access token; only a digest of it is kept. Its name owns the jobs that it submits."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    name: Mapped[str] = mapped_column(_NAME)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(Utc)
    expires_at: Mapped[datetime | None] = mapped_column(Utc)
    revoked_at: Mapped[datetime | None] = mapped_column(Utc)
    last_used_at: Mapped[datetime | None] = mapped_column(Utc)


class AssetRow(Base):
    """An upload; its id is the SHA-256 of its bytes."""

    __tablename__ = "assets"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(Utc)


class AssetOwnerRow(Base):
    """Whose upload an asset is; the same bytes may be those of several owners."""

    __tablename__ = "asset_owners"

    asset_id: Mapped[str] = mapped_column(
        ForeignKey("assets.id", ondelete="CASCADE"), primary_key=True
    )
    owner: Mapped[str] = mapped_column(_NAME, primary_key=True)
    name: Mapped[str] = mapped_column(_NAME)
    created_at: Mapped[datetime] = mapped_column(Utc)
