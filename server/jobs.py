"""The queue: the sole writer of a job's state. Every change is one transaction with its event."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.db import Database, now
from server.db.models import ArtifactRow, EventRow, IdempotencyRow, JobRow, OpRow
from server.errors import IdempotencyError, LeaseLostError, NotFoundError, QuotaError
from server.ids import new_id
from server.ranking import as_number, is_better
from server.schemas import EventKind, Submission
from server.states import ACTIVE, ENDED, Move, State, after
from server.turns import next_job

_LOST = "its worker stopped without a word, and its lease ran out"


@dataclass(frozen=True)
class Claim:
    """A worker's hold on a job: it may write while the job's fence is this one."""

    job_id: str
    worker_id: str
    fence: int


@dataclass(frozen=True)
class Ending:
    """What a search came to, for the job's row."""

    best: Mapping[str, Any] | None
    baseline: float | None
    goal_met: bool | None
    quantized_ops: int | None
    stop_reason: str
    ops: Sequence[Mapping[str, Any]] = ()


class Jobs:
    """All that can be done to jobs, by people (`owner` None stands for all owners) and workers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # People

    def submit(
        self,
        submission: Submission,
        owner: str,
        key: str | None = None,
        max_queued: int | None = None,
    ) -> tuple[JobRow, bool]:
        """Queue a job; return it and whether it is new.

        The same `key` (of Idempotency-Key) with the same submission gives the job that it gave
        first. Raises IdempotencyError for another submission, QuotaError where the owner has
        `max_queued` jobs waiting.
        """
        digest = _digest(submission)
        try:
            with self._database.writing() as session:
                known = None if key is None else session.get(IdempotencyRow, (owner, key))
                if known is not None:
                    return _same(session, known, digest), False
                _check_quota(session, owner, max_queued)
                job = _queued(session, submission, owner)
                if key is not None:
                    row = IdempotencyRow(owner=owner, key=key, body_sha256=digest, job_id=job.id)
                    row.created_at = job.created_at
                    session.add(row)
                return job, True
        except IntegrityError:  # the same key came twice at the same moment
            if key is None:
                raise
            return self.submit(submission, owner, key, max_queued)

    def get(self, job_id: str, owner: str | None = None) -> JobRow:
        """Return a job; raises NotFoundError, too, for one of another owner."""
        with self._database.reading() as session:
            return _found(session.get(JobRow, job_id), job_id, owner)

    def page(
        self,
        limit: int,
        before: str | None = None,
        owner: str | None = None,
        states: Sequence[State] = (),
        recipe: str | None = None,
        label: tuple[str, str] | None = None,
    ) -> list[JobRow]:
        """Return jobs, newest first, that were made before the one of this id."""
        query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
        if before is not None:
            query = query.where(JobRow.id < before)
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        if states:
            query = query.where(JobRow.state.in_([str(state) for state in states]))
        if recipe is not None:
            query = query.where(JobRow.recipe == recipe)
        if label is not None:
            query = query.where(JobRow.labels[label[0]].as_string() == label[1])
        with self._database.reading() as session:
            return list(session.scalars(query))

    def ask(self, job_id: str, move: Move, owner: str | None = None) -> JobRow:
        """Pause, resume or cancel a job; raises TransitionError where its state forbids that."""
        with self._database.writing() as session:
            job = _found(session.get(JobRow, job_id, with_for_update=True), job_id, owner)
            _move(session, job, move)
            return job

    def events(
        self, job_id: str, after_id: int = 0, limit: int = 1000, owner: str | None = None
    ) -> list[EventRow]:
        """Return the events of a job that follow this one, the oldest first."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after_id)
        with self._database.reading() as session:
            _found(session.get(JobRow, job_id), job_id, owner)
            return list(session.scalars(query.order_by(EventRow.id).limit(limit)))

    def last_events(self, job_ids: Sequence[str]) -> dict[str, int]:
        """Return the id of the last event of each of these jobs."""
        query = select(EventRow.job_id, func.max(EventRow.id)).group_by(EventRow.job_id)
        with self._database.reading() as session:
            found = session.execute(query.where(EventRow.job_id.in_(job_ids)))
            return {job_id: last for job_id, last in found}

    # Workers

    def claim(self, worker_id: str, lease_s: float) -> tuple[Claim, JobRow] | None:
        """Take the next job, None where none waits.

        Owners take turns: first come those with the fewest running jobs, of these the one that has
        waited longest since a job of its was taken; then priority, then age.
        """
        with self._database.writing() as session:
            job = session.scalars(next_job()).first()
            if job is None:
                return None
            moment = now(session)
            job.worker_id, job.fence = worker_id, job.fence + 1
            job.attempt = job.crashes + 1
            job.claimed_at = moment
            job.started_at = job.started_at or moment
            job.lease_until = moment + timedelta(seconds=lease_s)
            _move(session, job, Move.CLAIM, worker=worker_id)
            return Claim(job.id, worker_id, job.fence), job

    def renew(self, claim: Claim, lease_s: float) -> State:
        """Hold a job for some time more; return its state, which may ask to pause or to cancel.

        Raises LeaseLostError where the job is no longer this worker's.
        """
        with self._database.writing() as session:
            until = now(session) + timedelta(seconds=lease_s)
            held = session.execute(_fenced(claim).values(lease_until=until).returning(JobRow.state))
            state = held.scalar_one_or_none()
            if state is None:
                raise _lease_lost(claim)
            return State(state)

    def store_trial(
        self, claim: Claim, session: Session, number: int, record: Mapping[str, Any]
    ) -> State:
        """Take note of a trial in the transaction that stores it; raises LeaseLostError.

        Returns the job's state, which may ask to pause or to cancel.
        """
        job = self._held(session, claim)
        shown = {key: value for key, value in record.items() if key not in ("plan", "scores")}
        if number == 0:
            job.baseline = as_number(record.get("accuracy"))
        else:
            job.trials += 1
            if is_better(shown, job):
                job.best = shown
        job.version += 1
        _add_event(session, job, "trial", shown)
        return State(job.state)

    def report(self, claim: Claim, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Append an event; raises LeaseLostError."""
        with self._database.writing() as session:
            _add_event(session, self._held(session, claim), kind, data)

    def check(self, claim: Claim, session: Session) -> None:
        """Hold a job in a transaction of the library's; raises LeaseLostError."""
        self._held(session, claim)

    def complete(self, claim: Claim, config: Mapping[str, Any]) -> None:
        """Store the configuration as the recipe's task completes it; raises LeaseLostError."""
        with self._database.writing() as session:
            job = self._held(session, claim)
            if job.config != config:
                job.config = dict(config)
                job.version += 1

    def succeed(
        self,
        claim: Claim,
        ending: Ending,
        artifacts: Sequence[Mapping[str, Any]] = (),
        publish: Callable[[], None] | None = None,
    ) -> None:
        """End a job with what its search came to, and the files that it left.

        `publish` moves the files to their place while the job is locked, so that only its holder
        does; what it raises goes on, and the job has not ended.
        """
        with self._database.writing() as session:
            job = self._held(session, claim)
            job.best = None if ending.best is None else dict(ending.best)
            job.baseline = ending.baseline
            job.goal_met, job.quantized_ops = ending.goal_met, ending.quantized_ops
            job.stop_reason = ending.stop_reason
            for position, summary in enumerate(ending.ops):
                session.add(OpRow(job_id=job.id, position=position, summary=dict(summary)))
            moment = now(session)
            for artifact in artifacts:
                session.add(ArtifactRow(job_id=job.id, created_at=moment, **artifact))
            _move(session, job, Move.SUCCEED, stop_reason=ending.stop_reason)
            if publish is not None:
                publish()

    def fail(self, claim: Claim, reason: str) -> None:
        """End a job that cannot go on; `reason` holds the traceback."""
        with self._database.writing() as session:
            _failed(session, self._held(session, claim), reason)

    def release(self, claim: Claim) -> None:
        """Give a job back unharmed: to the queue, or to where it was asked to go."""
        with self._database.writing() as session:
            _move(session, self._held(session, claim), Move.RELEASE)

    def lose(self, claim: Claim, reason: str) -> None:
        """Give back a job whose process died: it is tried again while attempts are left."""
        with self._database.writing() as session:
            _lost(session, self._held(session, claim), reason)

    def expire(self) -> list[str]:
        """Take back the jobs whose lease ran out; return their ids."""
        with self._database.writing() as session:
            query = select(JobRow).where(
                JobRow.state.in_(ACTIVE), JobRow.lease_until < now(session)
            )
            jobs = list(session.scalars(query.with_for_update(skip_locked=True)))
            for job in jobs:
                _lost(session, job, _LOST)
            return [job.id for job in jobs]

    def _held(self, session: Session, claim: Claim) -> JobRow:
        """Return the job, locked; raises LeaseLostError where it is no longer this worker's."""
        locked = session.execute(_fenced(claim).values(fence=claim.fence))
        if locked.rowcount != 1:  # type: ignore[attr-defined]
            raise _lease_lost(claim)
        return session.get_one(JobRow, claim.job_id, populate_existing=True)


def _digest(submission: Submission) -> str:
    text = json.dumps(submission.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _same(session: Session, known: IdempotencyRow, digest: str) -> JobRow:
    if known.body_sha256 != digest:
        raise IdempotencyError(
            f"the Idempotency-Key {known.key!r} came before with another body: use a new key for "
            "another job"
        )
    return session.get_one(JobRow, known.job_id)


def _check_quota(session: Session, owner: str, max_queued: int | None) -> None:
    if max_queued is None:
        return
    waiting = session.scalars(
        select(func.count()).where(JobRow.owner == owner, JobRow.state == State.QUEUED)
    ).one()
    if waiting >= max_queued:
        raise QuotaError(f"{waiting} jobs of {owner!r} are waiting already: let some of them end")


def _queued(session: Session, submission: Submission, owner: str) -> JobRow:
    job_id = new_id()
    job = JobRow(
        id=job_id,
        recipe=submission.recipe,
        params=submission.params,
        config=submission.config.model_dump(mode="json"),
        priority=submission.priority,
        labels=submission.labels,
        max_attempts=submission.max_attempts,
        timeout_s=submission.timeout_s,
        owner=owner,
        state=State.QUEUED,
        version=1,
        created_at=now(session),
        attempt=0,
        crashes=0,
        fence=0,
        trials=0,
        spent_s=0.0,
        study_name=f"job-{job_id}",
    )
    session.add(job)
    session.flush()
    _add_event(session, job, "state", {"state": job.state})
    return job


def _found(job: JobRow | None, job_id: str, owner: str | None) -> JobRow:
    if job is None or (owner is not None and job.owner != owner):
        raise NotFoundError(f"there is no job {job_id!r}")
    return job


def _fenced(claim: Claim) -> Any:
    """Return an update that reaches the job only while it is this worker's."""
    mine = and_(JobRow.worker_id == claim.worker_id, JobRow.fence == claim.fence)
    return update(JobRow).where(JobRow.id == claim.job_id, mine, JobRow.state.in_(ACTIVE))


def _lease_lost(claim: Claim) -> LeaseLostError:
    return LeaseLostError(f"job {claim.job_id} is no longer held by worker {claim.worker_id}")


def _lost(session: Session, job: JobRow, reason: str) -> None:
    job.crashes += 1
    if job.crashes < job.max_attempts:
        _move(session, job, Move.LOSE, reason=reason)
        return
    _failed(session, job, f"{reason} (attempt {job.attempt} of {job.max_attempts})")


def _failed(session: Session, job: JobRow, reason: str) -> None:
    """End a job with an error; one that was being cancelled just is cancelled."""
    if after(State(job.state), Move.FAIL) == State.FAILED:
        job.error = reason
        _add_event(session, job, "error", {"error": reason})
    _move(session, job, Move.FAIL)


def _move(session: Session, job: JobRow, move: Move, **told: Any) -> None:
    """Change the state, and say so; a move that changes nothing leaves no trace."""
    before = State(job.state)
    job.state = after(before, move)
    if job.state == before:
        return
    job.version += 1
    if before in ACTIVE and job.state not in ACTIVE:
        _let_go(job, now(session))
    if job.state in ENDED:
        job.finished_at = now(session)
    _add_event(session, job, "state", {"state": str(job.state), "attempt": job.attempt, **told})


def _let_go(job: JobRow, moment: datetime) -> None:
    if job.claimed_at is not None:
        job.spent_s += max((moment - job.claimed_at).total_seconds(), 0.0)
    job.worker_id = job.lease_until = None


def _add_event(session: Session, job: JobRow, kind: EventKind, data: Mapping[str, Any]) -> None:
    """Append an event. The job's row is locked, so that ids grow in the order of commit."""
    session.flush()
    session.add(EventRow(job_id=job.id, kind=kind, data=dict(data), created_at=now(session)))
    session.flush()
