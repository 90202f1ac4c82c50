"""What one job's page shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select

from server import artifacts
from server.dashboard import bitmap, charts, searches, trials_view
from server.dashboard.bitmap import BitMap
from server.dashboard.charts import History
from server.dashboard.jobs_view import JobCard, card
from server.dashboard.searches import Search
from server.dashboard.trials_view import TrialTable
from server.db import Database
from server.db.models import ArtifactRow, EventRow, JobRow
from tuner.report.scatter import Scatter, scatter

REPORT = "report.html"
_EVENTS = 100


@dataclass(frozen=True)
class JobPage:
    """All of it; `bitmap_of` is the number of the trial whose plan the bit map shows."""

    job: JobRow
    card: JobCard
    search: Search
    goal: str
    plot: Scatter | None
    history: History | None
    bitmap: BitMap | None
    bitmap_of: int | None
    table: TrialTable
    artifacts: Sequence[ArtifactRow]
    events: Sequence[EventRow]
    more_events: bool

    @property
    def has_report(self) -> bool:
        """Whether the self-contained report is among the artifacts."""
        return any(row.name == REPORT for row in self.artifacts)

    @property
    def best_label(self) -> str:
        """What the plot's best point is called."""
        return "best so far" if self.card.is_live else "returned"


def job_page(database: Database, job: JobRow, before: int | None = None) -> JobPage:
    """Return a job's page, with the trials before this number in its table."""
    search = searches.of_job(database, job)
    costs = search.baseline.costs if search.baseline is not None else {}
    source = search.source()
    baseline = search.baseline.accuracy if search.baseline is not None else None
    events = _last_events(database, job.id)
    return JobPage(
        job=job,
        card=card(job, costs),
        search=search,
        goal=search.config.goal.describe(baseline),
        plot=scatter(source) if source is not None else None,
        history=charts.history(search),
        bitmap=_bitmap(database, job, search),
        bitmap_of=search.best.number if search.best is not None else None,
        table=trials_view.table(database, job.study_name, search, before),
        artifacts=artifacts.listed(database, job.id),
        events=events[:_EVENTS],
        more_events=len(events) > _EVENTS,
    )


def _bitmap(database: Database, job: JobRow, search: Search) -> BitMap | None:
    """Return the map of the plan that was returned, or is best so far."""
    rows = searches.op_table(database, job.id)
    if rows:
        return bitmap.of_table(rows)
    if search.best is None:
        return None
    found = searches.plans(database, job.study_name, [search.best.number])
    options = searches.options(database, job.study_name)
    return bitmap.of_plan(found.get(search.best.number, {}), options)


def _last_events(database: Database, job_id: str) -> list[EventRow]:
    """Return the last events, the newest first, and one more than are shown if there are more."""
    query = select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.id.desc())
    with database.reading() as session:
        return list(session.scalars(query.limit(_EVENTS + 1)))
