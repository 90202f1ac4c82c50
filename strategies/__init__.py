"""Search strategies: what to try next, given a space and what was tried."""

from difflib import get_close_matches

from strategies.auto import Auto
from strategies.base import Outcome, Proposal, Search, Strategy
from strategies.basic import Basic
from strategies.random import Random
from strategies.replay import SearchRun
from strategies.space import Assignment, Option, Space, Unit
from strategies.tpe import TPE

STRATEGIES: dict[str, type[Strategy]] = {
    "auto": Auto,
    "basic": Basic,
    "random": Random,
    "tpe": TPE,
}


def get(name: str) -> type[Strategy]:
    """Return the strategy of this name; an unknown name is an error that lists the near ones."""
    if name not in STRATEGIES:
        near = get_close_matches(name, STRATEGIES, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(STRATEGIES)}."
        raise ValueError(f"unknown strategy {name!r}. {hint}")
    return STRATEGIES[name]


__all__ = [
    "STRATEGIES",
    "Assignment",
    "Option",
    "Outcome",
    "Proposal",
    "Search",
    "SearchRun",
    "Space",
    "Strategy",
    "Unit",
    "get",
]
