"""The queue as a whole: how many jobs wait and run, for how long, and whose they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select

from server.db import Database
from server.db.models import JobRow
from server.states import ENDED, State


@dataclass(frozen=True)
class OwnerLoad:
    """How many jobs of an owner are in which state; ended ones are not counted."""

    owner: str
    states: Mapping[str, int]
    oldest: datetime | None


@dataclass(frozen=True)
class QueueState:
    """Jobs that have not ended."""

    waiting: int
    running: int
    paused: int
    oldest: datetime | None
    owners: tuple[OwnerLoad, ...]


def state(database: Database) -> QueueState:
    """Return how the queue is now."""
    query = (
        select(JobRow.owner, JobRow.state, func.count(), func.min(JobRow.created_at))
        .where(JobRow.state.not_in([str(one) for one in ENDED]))
        .group_by(JobRow.owner, JobRow.state)
        .order_by(JobRow.owner)
    )
    counts: dict[str, dict[str, int]] = {}
    oldest: dict[str, datetime] = {}
    with database.reading() as session:
        for owner, name, count, first in session.execute(query):
            counts.setdefault(owner, {})[name] = count
            if name == State.QUEUED:
                oldest[owner] = first
    owners = tuple(OwnerLoad(who, found, oldest.get(who)) for who, found in counts.items())
    return QueueState(
        waiting=_total(owners, State.QUEUED),
        running=_total(owners, State.RUNNING, State.PAUSING, State.CANCELLING),
        paused=_total(owners, State.PAUSED),
        oldest=min(oldest.values(), default=None),
        owners=owners,
    )


def _total(owners: tuple[OwnerLoad, ...], *states: State) -> int:
    return sum(owner.states.get(state, 0) for owner in owners for state in states)
