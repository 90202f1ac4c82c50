"""A database that is away is waited for, and nothing else is."""

import pytest

from server.errors import DatabaseError, LeaseLostError
from server.patience import patiently


def _failing(times: int, error: Exception) -> tuple[list[int], object]:
    calls: list[int] = []

    def access() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, access


def test_a_database_that_comes_back() -> None:
    calls, access = _failing(2, DatabaseError("away"))
    assert patiently(access, 30.0) == "done"  # type: ignore[arg-type]
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("error", "patience_s"), [(DatabaseError("away"), 0.05), (LeaseLostError("lost"), 30.0)]
)
def test_what_is_not_waited_for(error: Exception, patience_s: float) -> None:
    calls, access = _failing(1, error)
    with pytest.raises(type(error)):
        patiently(access, patience_s)  # type: ignore[arg-type]
    assert len(calls) == 1
