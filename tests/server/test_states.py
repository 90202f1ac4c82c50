"""The transition table, as a table: every state and every move."""

import pytest

from server.errors import TransitionError
from server.states import ACTIVE, ENDED, TRANSITIONS, Move, State, after

_MOVES = ("claim", "pause", "resume", "cancel", "release", "lose", "succeed", "fail")
# A column a move, in the order above; – where the move is refused.
_TABLE = """
queued      running  paused   queued   cancelled   –          –          –          –
running     –        pausing  running  cancelling  queued     queued     succeeded  failed
pausing     –        pausing  running  cancelling  paused     paused     succeeded  failed
paused      –        paused   queued   cancelled   –          –          –          –
cancelling  –        –        –        cancelling  cancelled  cancelled  succeeded  cancelled
cancelled   –        –        –        cancelled   –          –          –          –
succeeded   –        –        –        –           –          –          –          –
failed      –        –        –        –           –          –          –          –
"""
CASES = [
    (cells[0], move, target)
    for cells in (line.split() for line in _TABLE.strip().splitlines())
    for move, target in zip(_MOVES, cells[1:], strict=True)
]


def test_every_state_and_move_has_a_case() -> None:
    assert {(state, move) for state, move, _ in CASES} == {(s, m) for s in State for m in Move}


@pytest.mark.parametrize(("state", "move", "target"), CASES)
def test_a_move_leads_where_the_table_says(state: str, move: str, target: str) -> None:
    if target != "–":
        assert after(State(state), Move(move)) == target
        return
    with pytest.raises(TransitionError, match=f"is {state} cannot {move}") as caught:
        after(State(state), Move(move))
    assert caught.value.details == {"state": state}


def test_a_refusal_names_what_is_allowed() -> None:
    with pytest.raises(TransitionError, match=r"can do is cancel$"):
        after(State.CANCELLED, Move.RESUME)
    with pytest.raises(TransitionError, match=r"can do is nothing$"):
        after(State.FAILED, Move.CANCEL)


def test_nothing_leaves_an_end() -> None:
    for state in ENDED:
        assert set(TRANSITIONS[state].values()) <= {state}


def test_a_worker_can_always_let_go() -> None:
    for state in ACTIVE:
        for move in (Move.RELEASE, Move.LOSE, Move.SUCCEED, Move.FAIL):
            assert after(state, move) not in ACTIVE
