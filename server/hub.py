"""Tells streams that something happened to the job that they watch: one poll for all of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from anyio import CapacityLimiter, Event, to_thread
from sqlalchemy.exc import SQLAlchemyError

from server.errors import DatabaseError
from server.jobs import Jobs

_POLL_S = 0.25
_log = logging.getLogger(__name__)


class Watch:
    """One stream's eye on a job."""

    def __init__(self) -> None:
        self.is_closed = False
        self._last = 0
        self._woken = Event()

    async def newer_than(self, event_id: int) -> None:
        """Wait until the job has an event after this one, or the hub was closed."""
        while self._last <= event_id and not self.is_closed:
            self._woken = Event()
            await self._woken.wait()

    def tell(self, last: int) -> None:
        """Take note of the id of the job's last event."""
        self._last = last
        self._woken.set()

    def close(self) -> None:
        """Let the stream end."""
        self.is_closed = True
        self._woken.set()


class Hub:
    """All watches by job. Its methods belong to the event loop's thread."""

    def __init__(self, jobs: Jobs, poll_s: float = _POLL_S) -> None:
        self._jobs = jobs
        self._poll_s = poll_s
        self._watches: dict[str, set[Watch]] = {}
        self._is_closed = False
        self._somebody = Event()

    @property
    def watched(self) -> int:
        """How many streams there are."""
        return sum(map(len, self._watches.values()))

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Watch]:
        """Watch a job inside the block."""
        watch = Watch()
        watch.is_closed = self._is_closed
        self._watches.setdefault(job_id, set()).add(watch)
        self._somebody.set()
        try:
            yield watch
        finally:
            self._watches[job_id].discard(watch)
            if not self._watches[job_id]:
                del self._watches[job_id]

    async def run(self) -> None:
        """Look for new events of the watched jobs, for ever."""
        own_thread = CapacityLimiter(1)  # requests may have taken all others
        while True:
            if not self._watches:
                self._somebody = Event()
                await self._somebody.wait()
            await self._look(own_thread)
            await anyio.sleep(self._poll_s)

    def close(self) -> None:
        """End all streams, so that a server that stops does not wait for their clients."""
        self._is_closed = True
        for watches in self._watches.values():
            for watch in watches:
                watch.close()

    async def _look(self, thread: CapacityLimiter) -> None:
        try:
            found = await to_thread.run_sync(
                self._jobs.last_events, list(self._watches), limiter=thread
            )
        except (DatabaseError, SQLAlchemyError) as error:  # it may come back
            _log.warning("the hub cannot read events: %s", error)
            return
        for job_id, last in found.items():
            for watch in self._watches.get(job_id, ()):
                watch.tell(last)
