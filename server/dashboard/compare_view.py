"""Two jobs side by side."""

from dataclasses import dataclass

from server.dashboard import searches
from server.dashboard.charts import Contrast, contrast
from server.dashboard.jobs_view import JobCard, card
from server.dashboard.plans import Change, changes
from server.dashboard.searches import Search
from server.db import Database
from server.db.models import JobRow
from tuner.config import COST_OF_OBJECTIVE


@dataclass(frozen=True)
class Side:
    """One of the two jobs."""

    key: str
    card: JobCard
    search: Search
    goal: str

    @property
    def bops(self) -> float | None:
        """The best trial's bit operations ÷ FP32's."""
        return self.search.cost_ratio(self.search.best, "bops")

    @property
    def size(self) -> float | None:
        """The best trial's size ÷ FP32's."""
        return self.search.cost_ratio(self.search.best, "size_bytes")

    @property
    def evaluation_s(self) -> float:
        """How long the trials took together."""
        return sum(record.duration_s for record in self.search.trials)


@dataclass(frozen=True)
class Comparison:
    """Both jobs; `changes` lead from the best plan of a to that of b, None where there is none."""

    a: Side
    b: Side
    plot: Contrast | None
    changes: tuple[Change, ...] | None
    cost: str


def compare(database: Database, a: JobRow, b: JobRow) -> Comparison:
    """Return two jobs side by side, by the cost that the first one makes small."""
    left, right = _side(database, "a", a), _side(database, "b", b)
    cost = COST_OF_OBJECTIVE[left.card.objective]
    return Comparison(
        a=left,
        b=right,
        plot=contrast(left.search, right.search, cost),
        changes=_changes(database, (a, left), (b, right)),
        cost=left.card.objective,
    )


def _side(database: Database, key: str, job: JobRow) -> Side:
    search = searches.of_job(database, job)
    costs = search.baseline.costs if search.baseline is not None else {}
    baseline = search.baseline.accuracy if search.baseline is not None else None
    return Side(key, card(job, costs), search, search.config.goal.describe(baseline))


def _changes(database: Database, *sides: tuple[JobRow, Side]) -> tuple[Change, ...] | None:
    plans = []
    for job, side in sides:
        if side.search.best is None:
            return None
        number = side.search.best.number
        plans.append(searches.plans(database, job.study_name, [number]).get(number, {}))
    return changes(*plans)
