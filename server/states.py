"""The states of a job, and the one table of what leads from which to which."""

from enum import StrEnum

from server.errors import TransitionError


class State(StrEnum):
    """Where a job is; the last three are its ends."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Move(StrEnum):
    """What can happen to a job: asked for by people, told by workers, or found by the clock."""

    CLAIM = "claim"  # a worker takes it
    PAUSE = "pause"  # asked: stop after the running trial
    RESUME = "resume"  # asked: go on from the stored trials
    CANCEL = "cancel"  # asked: stop now, for good
    RELEASE = "release"  # the worker gives it back unharmed
    LOSE = "lose"  # the worker or its process died, or its lease ran out; attempts are left
    SUCCEED = "succeed"
    FAIL = "fail"


ACTIVE = (State.RUNNING, State.PAUSING, State.CANCELLING)
"""The states in which a worker holds a job."""

ENDED = (State.CANCELLED, State.SUCCEEDED, State.FAILED)

TRANSITIONS: dict[State, dict[Move, State]] = {
    State.QUEUED: {
        Move.CLAIM: State.RUNNING,
        Move.PAUSE: State.PAUSED,
        Move.RESUME: State.QUEUED,
        Move.CANCEL: State.CANCELLED,
    },
    State.RUNNING: {
        Move.PAUSE: State.PAUSING,
        Move.RESUME: State.RUNNING,
        Move.CANCEL: State.CANCELLING,
        Move.RELEASE: State.QUEUED,
        Move.LOSE: State.QUEUED,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.FAILED,
    },
    State.PAUSING: {
        Move.PAUSE: State.PAUSING,
        Move.RESUME: State.RUNNING,
        Move.CANCEL: State.CANCELLING,
        Move.RELEASE: State.PAUSED,
        Move.LOSE: State.PAUSED,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.FAILED,
    },
    State.PAUSED: {
        Move.PAUSE: State.PAUSED,
        Move.RESUME: State.QUEUED,
        Move.CANCEL: State.CANCELLED,
    },
    State.CANCELLING: {
        Move.CANCEL: State.CANCELLING,
        Move.RELEASE: State.CANCELLED,
        Move.LOSE: State.CANCELLED,
        Move.SUCCEED: State.SUCCEEDED,
        Move.FAIL: State.CANCELLED,
    },
    State.CANCELLED: {Move.CANCEL: State.CANCELLED},
    State.SUCCEEDED: {},
    State.FAILED: {},
}


def after(state: State, move: Move) -> State:
    """Return the state that a move leads to; raises TransitionError where it leads nowhere."""
    target = TRANSITIONS[state].get(move)
    if target is None:
        allowed = ", ".join(TRANSITIONS[state]) or "nothing"
        raise TransitionError(
            f"a job that is {state} cannot {move}: what it can do is {allowed}", state=str(state)
        )
    return target
