"""The table of trials: a page of it, with what each changed of the best plan before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from server.dashboard.plans import Change, changes
from server.dashboard.searches import Search, plans
from server.db import Database
from tuner.records import TrialRecord

PAGE = 50
_LISTED = 30


@dataclass(frozen=True)
class TrialLine:
    """A row of the table: `changes` against the plan that was best before (None: it is FP32)."""

    record: TrialRecord
    bops: float | None
    size: float | None
    is_best: bool
    is_on_front: bool
    previous: int
    changes: tuple[Change, ...]

    @property
    def listed(self) -> tuple[Change, ...]:
        """The changes that the table itself lists."""
        return self.changes[:_LISTED]

    @property
    def last_error_line(self) -> str:
        """What went wrong, in a line."""
        lines = (self.record.error or "").strip().splitlines()
        return lines[-1] if lines else ""


@dataclass(frozen=True)
class TrialTable:
    """Rows, the newest first; `older` is where the next page begins, None on the last one."""

    lines: tuple[TrialLine, ...]
    total: int
    older: int | None
    is_first: bool


def table(
    database: Database, study_name: str, search: Search, before: int | None = None
) -> TrialTable:
    """Return the trials before this number, the newest first; the last page ends with FP32."""
    every = [*search.trials] if search.baseline is None else [search.baseline, *search.trials]
    found = [record for record in every if before is None or record.number < before]
    shown = list(reversed(found[-PAGE:]))
    return TrialTable(
        lines=tuple(_lines(database, study_name, search, shown)),
        total=len(search.trials),
        older=shown[-1].number if len(found) > PAGE else None,
        is_first=before is None,
    )


def _lines(
    database: Database, study_name: str, search: Search, shown: Sequence[TrialRecord]
) -> list[TrialLine]:
    source = search.source()
    front = {record.number for record in source.pareto()} if source else set()
    bests = search.bests()
    numbers = [0, *bests]
    previous = {n: bests.get(before, 0) for before, n in pairwise(numbers)}
    wanted = {record.number for record in shown} | {previous.get(r.number, 0) for r in shown}
    ops = plans(database, study_name, sorted(wanted))
    return [
        TrialLine(
            record=record,
            bops=search.cost_ratio(record, "bops"),
            size=search.cost_ratio(record, "size_bytes"),
            is_best=search.best is not None and record.number == search.best.number,
            is_on_front=record.number in front and record.meets_goal is not None,
            previous=previous.get(record.number, 0),
            changes=()
            if record.number == 0
            else changes(ops.get(previous.get(record.number, 0), {}), ops[record.number]),
        )
        for record in shown
    ]
