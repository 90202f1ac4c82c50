"""Whose job is next: owners take turns."""

from sqlalchemy import Select, func, select

from server.db.models import JobRow
from server.states import ACTIVE, State


def next_job() -> Select[JobRow]:
    """Return the query for the next waiting job, which it locks.

    First come owners with the fewest running jobs, of these the one that has waited longest since
    a job of its was taken; then priority, then age.
    """
    held = func.count().filter(JobRow.state.in_(ACTIVE))
    turns = (
        select(
            JobRow.owner, held.label("running"), func.max(JobRow.claimed_at).label("last_claimed")
        )
        .group_by(JobRow.owner)
        .subquery()
    )
    return (
        select(JobRow)
        .join(turns, turns.c.owner == JobRow.owner)
        .where(JobRow.state == State.QUEUED)
        .order_by(
            turns.c.running,
            turns.c.last_claimed.nulls_first(),
            JobRow.priority.desc(),
            JobRow.id,
        )
        .limit(1)
        .with_for_update(skip_locked=True, of=JobRow)
    )
