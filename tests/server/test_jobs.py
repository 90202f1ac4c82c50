"""The queue, on both databases: who gets a job, who may write to it, and what is left of it."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from server.db import Database, now
from server.db.models import EventRow, JobRow
from server.errors import (
    IdempotencyError,
    LeaseLostError,
    NotFoundError,
    QuotaError,
    TransitionError,
)
from server.jobs import Claim, Ending, Jobs
from server.states import Move, State
from server.trials import Trials
from tests.server.helpers import HEADER, LEASE_S, claimed, record, store, submission, succeeded
from tuner.storage import Storage, StudyStore

THREADS = 8


def _submitted(jobs: Jobs, owner: str = "ann", **fields: Any) -> str:
    return jobs.submit(submission(**fields), owner)[0].id


def _at_once(times: int, call: Callable[[int], Any]) -> list[Any]:
    """Call from that many threads, all at the same moment."""
    barrier = threading.Barrier(times)

    def run(index: int) -> Any:
        barrier.wait()
        return call(index)

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(run, range(times)))


def _expire_lease(database: Database, job_id: str) -> None:
    with database.writing() as session:
        session.get_one(JobRow, job_id).lease_until = now(session) - timedelta(seconds=1)


def _kinds(jobs: Jobs, job_id: str) -> list[str]:
    return [
        event.data["state"] if event.kind == "state" else event.kind
        for event in jobs.events(job_id)
    ]


def test_a_job_keeps_what_was_submitted(jobs: Jobs) -> None:
    sent = submission(
        config={"space": "mixed-int", "max_trials": 7},
        priority=3,
        labels={"team": "vision"},
        max_attempts=2,
        timeout_s=1.5,
    )
    job, is_new = jobs.submit(sent, "ann")
    kept = jobs.get(job.id)
    assert is_new
    assert (kept.recipe, kept.params, kept.owner) == (sent.recipe, sent.params, "ann")
    assert kept.config == sent.config.model_dump(mode="json")
    assert (kept.priority, kept.labels) == (3, {"team": "vision"})
    assert (kept.max_attempts, kept.timeout_s) == (2, 1.5)
    assert (kept.state, kept.version, kept.attempt, kept.trials) == ("queued", 1, 0, 0)
    assert kept.created_at.utcoffset() == timedelta(0)
    assert _kinds(jobs, job.id) == ["queued"]


def test_an_unknown_job_is_not_found(jobs: Jobs) -> None:
    own = _submitted(jobs, "ann")
    for read in (jobs.get, jobs.events):
        with pytest.raises(NotFoundError):
            read("0" * 26)
        with pytest.raises(NotFoundError):
            read(own, owner="bob")
    with pytest.raises(NotFoundError):
        jobs.ask(own, Move.CANCEL, owner="bob")
    assert jobs.get(own, owner="ann").state == "queued"


def test_pages_are_newest_first_and_do_not_overlap(jobs: Jobs) -> None:
    ids = [_submitted(jobs) for _ in range(5)]
    first = [job.id for job in jobs.page(2)]
    second = [job.id for job in jobs.page(3, before=first[-1])]
    assert first + second == sorted(ids, reverse=True)
    assert jobs.page(3, before=second[-1]) == []


def test_pages_can_be_filtered(jobs: Jobs) -> None:
    one = _submitted(jobs, "ann", labels={"team": "vision"})
    two = _submitted(jobs, "bob", recipe="char-lm", labels={"team": "text", "a.b/c": "x y"})
    jobs.ask(two, Move.PAUSE)

    def ids(**filters: Any) -> list[str]:
        return [job.id for job in jobs.page(10, **filters)]

    assert ids(owner="ann") == [one]
    assert ids(recipe="char-lm") == [two]
    assert ids(states=[State.QUEUED]) == [one]
    assert ids(states=[State.QUEUED, State.PAUSED]) == [two, one]
    assert ids(label=("team", "vision")) == [one]
    assert ids(label=("a.b/c", "x y")) == [two]
    assert ids(label=("none", "vision")) == []
    assert ids(owner="ann", recipe="char-lm") == []


def test_the_same_key_and_body_give_the_same_job(jobs: Jobs) -> None:
    first, is_new = jobs.submit(submission(), "ann", "key")
    again, is_again_new = jobs.submit(submission(), "ann", "key")
    assert (is_new, is_again_new) == (True, False)
    assert again.id == first.id
    with pytest.raises(IdempotencyError, match="'key' came before with another body"):
        jobs.submit(submission(priority=1), "ann", "key")
    assert jobs.submit(submission(), "bob", "key")[0].id != first.id
    assert len(jobs.page(10)) == 2


def test_a_key_that_comes_many_times_at_once_gives_one_job(jobs: Jobs) -> None:
    answers = _at_once(THREADS, lambda _: jobs.submit(submission(), "ann", "key"))
    assert len({job.id for job, _ in answers}) == 1
    assert sum(is_new for _, is_new in answers) == 1
    assert len(jobs.page(10)) == 1


def test_an_owner_may_not_fill_the_queue(jobs: Jobs) -> None:
    jobs.submit(submission(), "ann", max_queued=1)
    with pytest.raises(QuotaError, match="1 jobs of 'ann'"):
        jobs.submit(submission(), "ann", max_queued=1)
    jobs.submit(submission(), "bob", max_queued=1)
    claimed(jobs)
    jobs.submit(submission(), "ann", max_queued=1)


def test_every_job_is_claimed_exactly_once(jobs: Jobs) -> None:
    ids = [_submitted(jobs, f"owner {index % 3}") for index in range(40)]
    barrier = threading.Barrier(THREADS)

    def work(index: int) -> list[Claim]:
        barrier.wait()
        claims = []
        while (found := jobs.claim(f"w{index}", LEASE_S)) is not None:
            claims.append(found[0])
        return claims

    with ThreadPoolExecutor(THREADS) as pool:
        claims = [claim for some in pool.map(work, range(THREADS)) for claim in some]
    assert Counter(claim.job_id for claim in claims) == Counter(ids)
    for claim in claims:
        assert jobs.get(claim.job_id).worker_id == claim.worker_id
        assert _kinds(jobs, claim.job_id) == ["queued", "running"]


def test_nothing_is_claimed_where_nothing_waits(jobs: Jobs) -> None:
    assert jobs.claim("w", LEASE_S) is None
    jobs.ask(_submitted(jobs), Move.PAUSE)
    assert jobs.claim("w", LEASE_S) is None


def test_priority_goes_before_age(jobs: Jobs) -> None:
    old, urgent, new = (_submitted(jobs, priority=priority) for priority in (0, 5, 0))
    assert [claimed(jobs).job_id for _ in range(3)] == [urgent, old, new]


def test_owners_take_turns(jobs: Jobs) -> None:
    for owner in ("ann", "ann", "ann", "ann", "bob", "bob"):
        _submitted(jobs, owner, priority=100 if owner == "ann" else 0)
    order = [jobs.get(claimed(jobs).job_id).owner for _ in range(6)]
    assert order == ["ann", "bob", "ann", "bob", "ann", "ann"]


def test_who_waited_longest_comes_first_when_jobs_end(jobs: Jobs) -> None:
    for owner in ("ann", "ann", "bob", "bob", "cleo", "cleo"):
        _submitted(jobs, owner)
    order = []
    for _ in range(6):
        claim = claimed(jobs)
        order.append(jobs.get(claim.job_id).owner)
        jobs.fail(claim, "over")
    assert order == ["ann", "bob", "cleo", "ann", "bob", "cleo"]


def test_a_lease_can_be_renewed_and_says_what_is_asked(jobs: Jobs) -> None:
    job_id = _submitted(jobs)
    claim = claimed(jobs, lease_s=1)
    before = jobs.get(job_id)
    assert jobs.renew(claim, LEASE_S) == State.RUNNING
    after = jobs.get(job_id)
    assert before.lease_until is not None
    assert after.lease_until is not None
    assert after.lease_until > before.lease_until
    assert after.version == before.version
    jobs.ask(job_id, Move.PAUSE)
    assert jobs.renew(claim, LEASE_S) == State.PAUSING
    jobs.ask(job_id, Move.CANCEL)
    assert jobs.renew(claim, LEASE_S) == State.CANCELLING


def test_only_leases_that_ran_out_expire(jobs: Jobs, database: Database) -> None:
    kept, lost = _submitted(jobs), _submitted(jobs)
    claimed(jobs)
    claimed(jobs)
    _expire_lease(database, lost)
    assert jobs.expire() == [lost]
    assert jobs.expire() == []
    assert jobs.get(kept).state == "running"
    job = jobs.get(lost)
    assert (job.state, job.crashes, job.worker_id, job.lease_until) == ("queued", 1, None, None)
    assert job.spent_s > 0


def _writes(jobs: Jobs, claim: Claim, url: str) -> Mapping[str, Callable[[], Any]]:
    ending = Ending(None, None, None, None, "max_trials")
    return {
        "renew": lambda: jobs.renew(claim, LEASE_S),
        "report": lambda: jobs.report(claim, "progress", {}),
        "store a trial": lambda: store(jobs, claim, url, [record(1)]),
        "succeed": lambda: jobs.succeed(claim, ending),
        "fail": lambda: jobs.fail(claim, "no"),
        "release": lambda: jobs.release(claim),
        "lose": lambda: jobs.lose(claim, "no"),
    }


@pytest.mark.parametrize("write", _writes(None, None, ""))  # type: ignore[arg-type]
@pytest.mark.parametrize("is_taken_over", [False, True])
def test_who_lost_the_lease_cannot_write(
    write: str, is_taken_over: bool, jobs: Jobs, database: Database
) -> None:
    job_id = _submitted(jobs)
    old = claimed(jobs, "w")
    _expire_lease(database, job_id)
    jobs.expire()
    if is_taken_over:
        assert claimed(jobs, "w").fence == old.fence + 1  # the same worker, even
    before, events = jobs.get(job_id), _kinds(jobs, job_id)
    with pytest.raises(LeaseLostError, match="no longer held"):
        _writes(jobs, old, database.url)[write]()
    after = jobs.get(job_id)
    assert (after.state, after.version, after.fence) == (before.state, before.version, before.fence)
    assert _kinds(jobs, job_id) == events
    assert Trials(database).page(before.study_name, 10) == []


def test_a_job_that_crashes_is_tried_again_until_it_may_not(jobs: Jobs) -> None:
    job_id = _submitted(jobs, max_attempts=3)
    for attempt in (1, 2):
        claim = claimed(jobs)
        assert jobs.get(job_id).attempt == attempt
        jobs.lose(claim, "killed by signal 9")
        assert jobs.get(job_id).state == "queued"
    jobs.lose(claimed(jobs), "killed by signal 9")
    job = jobs.get(job_id)
    assert (job.state, job.error) == ("failed", "killed by signal 9 (attempt 3 of 3)")
    assert job.finished_at is not None
    states = ["queued", "running"] * 3
    assert _kinds(jobs, job_id) == [*states, "error", "failed"]
    assert jobs.claim("w", LEASE_S) is None


def test_to_give_back_a_job_is_no_attempt(jobs: Jobs) -> None:
    job_id = _submitted(jobs, max_attempts=1)
    for _ in range(3):
        jobs.release(claimed(jobs))
    assert (jobs.get(job_id).state, jobs.get(job_id).attempt) == ("queued", 1)


@pytest.mark.parametrize(
    ("move", "ends", "target"),
    [
        (Move.PAUSE, Jobs.release, "paused"),
        (Move.CANCEL, Jobs.release, "cancelled"),
        (Move.CANCEL, lambda jobs, claim: jobs.lose(claim, "killed"), "cancelled"),
        (Move.PAUSE, lambda jobs, claim: jobs.lose(claim, "killed"), "paused"),
        (Move.CANCEL, lambda jobs, claim: jobs.fail(claim, "error"), "cancelled"),
    ],
)
def test_a_worker_lets_go_where_it_was_asked_to(
    move: Move, ends: Callable[[Jobs, Claim], None], target: str, jobs: Jobs
) -> None:
    job_id = _submitted(jobs)
    claim = claimed(jobs)
    jobs.ask(job_id, move)
    ends(jobs, claim)
    assert jobs.get(job_id).state == target
    assert (jobs.get(job_id).finished_at is None) == (target == "paused")


def test_a_pause_and_a_resume_lead_back_to_the_queue(jobs: Jobs) -> None:
    job_id = _submitted(jobs)
    jobs.ask(job_id, Move.PAUSE)
    jobs.ask(job_id, Move.PAUSE)
    jobs.ask(job_id, Move.RESUME)
    claimed(jobs)
    assert _kinds(jobs, job_id) == ["queued", "paused", "queued", "running"]
    assert jobs.get(job_id).version == 4


def test_a_refused_move_changes_nothing(jobs: Jobs) -> None:
    job_id = _submitted(jobs)
    jobs.ask(job_id, Move.CANCEL)
    before = jobs.get(job_id).version
    with pytest.raises(TransitionError):
        jobs.ask(job_id, Move.RESUME)
    assert jobs.get(job_id).version == before
    assert _kinds(jobs, job_id) == ["queued", "cancelled"]


def test_moves_that_come_at_once_are_one_move(jobs: Jobs) -> None:
    job_id = _submitted(jobs)
    _at_once(THREADS, lambda _: jobs.ask(job_id, Move.CANCEL))
    assert _kinds(jobs, job_id) == ["queued", "cancelled"]
    assert jobs.get(job_id).version == 2


def test_trials_show_in_the_job_and_its_events(jobs: Jobs, database: Database) -> None:
    job_id = _submitted(jobs)
    claim = claimed(jobs)
    store(jobs, claim, database.url, [record(0), record(2), record(1, scores=[1.0, 0.0])])
    job = jobs.get(job_id)
    assert (job.trials, job.baseline) == (2, 0.9)
    assert job.best is not None
    assert job.best["number"] == 2  # the cheaper one
    assert not {"plan", "scores"} & job.best.keys()
    told = [event.data for event in jobs.events(job_id) if event.kind == "trial"]
    assert [data["number"] for data in told] == [0, 2, 1]
    assert not any({"plan", "scores"} & data.keys() for data in told)


def test_a_trial_is_stored_with_its_event_or_not_at_all(jobs: Jobs, database: Database) -> None:
    job_id = _submitted(jobs)
    claim = claimed(jobs)
    check = partial(jobs.store_trial, claim)

    def failing(session: Session, number: int, data: Mapping[str, Any]) -> None:
        check(session, number, data)
        raise RuntimeError("the power went")

    name = jobs.get(job_id).study_name
    study = StudyStore.open(Storage(database.url, failing), name, HEADER)
    before = jobs.get(job_id).version
    with pytest.raises(RuntimeError, match="power"):
        study.add(1, record(1))
    assert study.records() == []
    study.close()
    job = jobs.get(job_id)
    assert (job.trials, job.best, job.version) == (0, None, before)
    assert _kinds(jobs, job_id) == ["queued", "running"]


def test_a_number_that_is_taken_leaves_no_trace_in_the_job(jobs: Jobs, database: Database) -> None:
    job_id = _submitted(jobs)
    claim = claimed(jobs)
    store(jobs, claim, database.url, [record(1)])
    with pytest.raises(Exception, match="stored already"):
        store(jobs, claim, database.url, [record(1)])
    assert jobs.get(job_id).trials == 1
    assert _kinds(jobs, job_id) == ["queued", "running", "trial"]


def test_a_success_tells_all(jobs: Jobs, database: Database) -> None:
    job_id = succeeded(jobs, database.url)
    job = jobs.get(job_id)
    assert (job.state, job.stop_reason, job.goal_met, job.quantized_ops) == (
        "succeeded",
        "max_trials",
        True,
        1,
    )
    assert job.best is not None
    assert job.best["number"] == 3
    assert [op["name"] for _, op in Trials(database).ops(job_id, 10)] == ["conv1", "fc"]
    assert _kinds(jobs, job_id)[-1] == "succeeded"


def test_a_failure_keeps_its_traceback(jobs: Jobs) -> None:
    job_id = _submitted(jobs)
    jobs.fail(claimed(jobs), "Traceback (most recent call last): …")
    assert jobs.get(job_id).error == "Traceback (most recent call last): …"
    assert _kinds(jobs, job_id) == ["queued", "running", "error", "failed"]


def test_ids_of_events_grow_also_when_many_write(jobs: Jobs, database: Database) -> None:
    job_id = _submitted(jobs)
    claim = claimed(jobs)
    _at_once(THREADS, lambda index: jobs.report(claim, "progress", {"index": index}))
    events = jobs.events(job_id)
    assert [event.id for event in events] == sorted({event.id for event in events})
    assert len(events) == THREADS + 2
    middle = events[4].id
    assert [event.id for event in jobs.events(job_id, after_id=middle)] == [
        event.id for event in events[5:]
    ]
    assert jobs.last_events([job_id, "0" * 26]) == {job_id: events[-1].id}
    with database.reading() as session:
        assert set(session.scalars(select(EventRow.job_id))) == {job_id}
