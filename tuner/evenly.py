"""Picking some of many."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return so many items at even distances, the first and the last among them."""
    count = min(count, len(items))
    last = len(items) - 1
    return [items[round(i * last / max(count - 1, 1))] for i in range(count)]
