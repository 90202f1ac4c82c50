"""Ids are different, and in the order in which they were made."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.ids import new_id


def test_ids_grow_within_a_millisecond() -> None:
    ids = [new_id() for _ in range(20_000)]
    assert sorted(set(ids)) == ids
    assert {len(one) for one in ids} == {26}


def test_ids_grow_while_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = new_id()
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    assert before < new_id() < new_id()


def test_threads_get_different_ids() -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: new_id(), range(20_000)))
    assert len(set(ids)) == len(ids)
