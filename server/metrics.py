"""What Prometheus may ask: the queue, the workers, the trials and the HTTP requests."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from server.db import Database, now
from server.db.models import EventRow, JobRow, WorkerRow
from server.states import State
from server.workers import MISSED_LEASES

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_TRIAL_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
_REQUEST_BUCKETS_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
# ids are given before they are committed: an event may show up after one of a higher id
_SETTLED_AFTER = timedelta(seconds=5)
_BATCH = 1000


class Metrics:
    """The measurements of this process, and those of the database at the time of a scrape.

    Requests and streams (`streams` tells how many there are) are those of this process. Jobs,
    workers, lost leases, and the trials since this process began, are those of the whole database:
    of several servers, take the maximum.
    """

    def __init__(
        self, database: Database, lease_s: float, streams: Callable[[], int] = lambda: 0
    ) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._trials = _Trials(database, registry)
        registry.register(_Queue(database, lease_s))
        open_streams = Gauge(
            "accutune_event_streams", "Clients that follow events.", registry=registry
        )
        open_streams.set_function(streams)
        self._requests = Counter(
            "accutune_http_requests",
            "HTTP requests that were answered.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "accutune_http_request_seconds",
            "Time from a request to the end of its answer; event streams are left out.",
            ("method", "route"),
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )

    def count_request(self, route: str, method: str, status: int, seconds: float | None) -> None:
        """Take note of an answer; `route` is a template, and `seconds` None for a stream."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        if seconds is not None:
            self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """Return all measurements in Prometheus' text format."""
        self._trials.read()
        return generate_latest(self._registry)


class _Queue(Collector):
    """Reads the jobs and the workers at every scrape."""

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database = database
        self._silent_after = timedelta(seconds=MISSED_LEASES * lease_s)

    def describe(self) -> list[Metric]:
        """Return nothing: registering must not ask the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        depth = GaugeMetricFamily("accutune_jobs", "Jobs by state.", labels=("state",))
        age = GaugeMetricFamily(
            "accutune_oldest_queued_job_seconds", "Age of the job that has waited longest, or 0."
        )
        alive = GaugeMetricFamily("accutune_workers", "Workers that report.")
        slots = GaugeMetricFamily("accutune_worker_slots", "Jobs that they can run at a time.")
        lost = CounterMetricFamily(
            "accutune_leases_lost", "Times that a job's worker or its process died."
        )
        with self._database.reading() as session:
            moment = now(session)
            by_state = select(JobRow.state, func.count(), func.sum(JobRow.crashes))
            counts, losses = dict.fromkeys(State, 0), 0
            for state, count, crashes in session.execute(by_state.group_by(JobRow.state)):
                counts[State(state)] = count
                losses += crashes
            oldest = session.scalars(
                select(func.min(JobRow.created_at)).where(JobRow.state == State.QUEUED)
            ).one()
            reporting = select(func.count(), func.coalesce(func.sum(WorkerRow.slots), 0)).where(
                WorkerRow.state.in_(("running", "draining")),
                WorkerRow.heartbeat_at > moment - self._silent_after,
            )
            workers, free = session.execute(reporting).one()
        for state, count in counts.items():
            depth.add_metric((state,), count)
        waited = 0.0 if oldest is None else (moment - oldest).total_seconds()
        age.add_metric((), max(waited, 0.0))
        alive.add_metric((), workers)
        slots.add_metric((), free)
        lost.add_metric((), losses)
        yield from (depth, age, alive, slots, lost)


class _Trials:
    """Measures the trials that the events tell of, each once."""

    def __init__(self, database: Database, registry: CollectorRegistry) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._since = datetime.now(UTC)
        self._last = 0
        self._seconds = Histogram(
            "accutune_trial_seconds",
            "Duration of trials, the baseline among them.",
            ("state",),
            buckets=_TRIAL_BUCKETS_S,
            registry=registry,
        )

    def read(self) -> None:
        """Measure the trials that were stored since the last time."""
        with self._lock:
            while self._read_batch() == _BATCH:
                continue

    def _read_batch(self) -> int:
        with self._database.reading() as session:
            settled = now(session) - _SETTLED_AFTER
            query = (
                select(EventRow.id, EventRow.data)
                .where(EventRow.kind == "trial", EventRow.id > self._last)
                .where(EventRow.created_at >= self._since, EventRow.created_at < settled)
                .order_by(EventRow.id)
                .limit(_BATCH)
            )
            found = session.execute(query).all()
        for event_id, data in found:
            self._last = event_id
            self._seconds.labels(data["state"]).observe(data["duration_s"])
        return len(found)
