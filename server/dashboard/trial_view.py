"""What one trial's page shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.dashboard import bitmap, searches
from server.dashboard.bitmap import BitMap
from server.dashboard.plans import Change, changes, ops_of
from server.dashboard.searches import Search
from server.errors import NotFoundError
from server.services import Services
from tuner.records import OpSummary, TrialRecord


@dataclass(frozen=True)
class CostLine:
    """One of a trial's costs, and FP32's."""

    name: str
    value: float
    baseline: float | None
    ratio: float | None


@dataclass(frozen=True)
class TrialPage:
    """All of it; `changes` against the plan of trial `against`."""

    record: TrialRecord
    search: Search
    costs: tuple[CostLine, ...]
    bitmap: BitMap
    against: int
    changes: tuple[Change, ...]
    before: int | None
    after: int | None


def trial_page(
    services: Services,
    study_name: str,
    search: Search,
    number: int,
    against: int | None,
    table: Sequence[OpSummary] = (),
) -> TrialPage:
    """Return a trial's page; raises NotFoundError where there is no such trial."""
    ops = ops_of(services.trials.get(study_name, number))
    every = {r.number: r for r in search.trials}
    if search.baseline is not None:
        every[0] = search.baseline
    if number not in every:  # stored in between
        raise NotFoundError(f"there is no trial {number} yet")
    record = every[number]
    other = _previous_best(search, number) if against is None else against
    base = ops_of(services.trials.get(study_name, other))
    options = searches.options(services.database, study_name)
    total = record.costs.get("bops")
    return TrialPage(
        record=record,
        search=search,
        costs=tuple(_cost_lines(search, record)),
        bitmap=bitmap.of_plan(ops, options, table, total),
        against=other,
        changes=changes(base, ops),
        before=max((n for n in every if n < number), default=None),
        after=min((n for n in every if n > number), default=None),
    )


def _previous_best(search: Search, number: int) -> int:
    found = [best for trial, best in search.bests().items() if trial < number]
    return found[-1] if found else 0


def _cost_lines(search: Search, record: TrialRecord) -> list[CostLine]:
    theirs = search.baseline.costs if search.baseline is not None else {}
    return [
        CostLine(name, value, theirs.get(name), search.cost_ratio(record, name))
        for name, value in record.costs.items()
    ]
