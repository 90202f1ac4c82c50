"""A worker: takes jobs from the queue and runs each in a process of its own."""

import contextlib
import logging
import signal
import threading
import time
from functools import partial
from queue import Empty, SimpleQueue

from sqlalchemy.exc import SQLAlchemyError

from server import leftovers
from server.db import Database, is_current
from server.errors import DatabaseError, SettingsError
from server.heartbeat import Heartbeat
from server.jobs import Jobs
from server.logs import bind
from server.patience import patiently
from server.settings import Settings
from server.supervisor import Supervisor

_LONGEST_PAUSE_S = 30.0
_START_PATIENCE_S = 60.0
_SWEEP_S = 600.0
_log = logging.getLogger(__name__)


class Worker:
    """Runs up to `settings.slots` jobs at a time until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = Database(settings.database)
        self._jobs = Jobs(self._database)
        self._heartbeat = Heartbeat(settings, self._database)
        self._slots: dict[int, tuple[Supervisor, threading.Thread]] = {}
        self._drain_s: float | None = None
        self._sweep_at = time.monotonic()
        self._wake: SimpleQueue[None] = SimpleQueue()  # unlike an Event, safe in signal handlers

    @property
    def id(self) -> str:
        """The worker's id in the table of workers."""
        return self._heartbeat.worker_id

    def run(self) -> None:
        """Take jobs until `stop` is called, then wait for the running ones to be given back.

        Raises SettingsError where the database lacks tables, DatabaseError where it is away.
        """
        with contextlib.closing(self._database):
            patiently(partial(check_tables, self._database), _START_PATIENCE_S)
            self._heartbeat.start()
            _log.info("worker %s takes jobs from %s", self.id, self._database.engine.url)
            try:
                self._take_jobs()
            finally:
                self._heartbeat.drain()
                self._drain()
                self._heartbeat.end()

    def stop(self, *_: object) -> None:
        """Take no more jobs, and let the running trials end; at the second call, interrupt them.

        Any thread may call this, and it may be a signal's handler.
        """
        self._drain_s = self._settings.drain_s if self._drain_s is None else 0.0
        self._wake.put(None)

    def _take_jobs(self) -> None:
        pause_s = self._settings.poll_s
        while self._drain_s is None:
            try:
                has_taken = self._take_job()
                pause_s = self._settings.poll_s
            except (DatabaseError, SQLAlchemyError) as error:
                _log.warning("the queue cannot be read: %s", error)
                has_taken = False
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if not has_taken:
                self._sleep(pause_s)

    def _take_job(self) -> bool:
        """Take back what was lost, and the next job if a slot is free; return whether it was."""
        self._jobs.expire()
        self._sweep()
        slot = self._free_slot()
        claimed = None if slot is None else self._jobs.claim(self.id, self._settings.lease_s)
        if slot is None or claimed is None:
            return False
        claim, job = claimed
        _log.info("job %s: attempt %d", job.id, job.attempt)
        supervisor = Supervisor(self._settings, self._jobs, claim, job, self._gpu(slot))
        thread = threading.Thread(target=self._supervise, args=(supervisor, job.id))
        self._slots[slot] = supervisor, thread
        thread.start()
        return True

    def _sweep(self) -> None:
        """From time to time remove what jobs left that ended while no worker held them."""
        if time.monotonic() >= self._sweep_at:
            leftovers.sweep(self._settings, self._jobs)
            self._sweep_at = time.monotonic() + _SWEEP_S

    def _supervise(self, supervisor: Supervisor, job_id: str) -> None:
        with bind(job_id=job_id):
            try:
                supervisor.run()
            except Exception:  # the worker's boundary: other jobs go on, this one's lease runs out
                _log.exception("a job is left alone")
            finally:
                self._wake.put(None)

    def _free_slot(self) -> int | None:
        for slot in range(self._settings.slots):
            if slot not in self._slots or not self._slots[slot][1].is_alive():
                return slot
        return None

    def _gpu(self, slot: int) -> str | None:
        """Return the device of a slot; more slots than devices share them."""
        gpus = self._settings.gpus
        return gpus[slot % len(gpus)] if gpus else None

    def _drain(self) -> None:
        told_s: float | None = None
        while any(thread.is_alive() for _, thread in self._slots.values()):
            within_s = self._settings.drain_s if self._drain_s is None else self._drain_s
            if within_s != told_s:
                told_s = within_s
                for supervisor, _ in self._slots.values():
                    supervisor.drain(within_s)
            self._sleep(self._settings.poll_s)

    def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(Empty):
            self._wake.get(timeout=seconds)


def check_tables(database: Database) -> None:
    """Raise SettingsError where the database lacks tables of this version."""
    if not is_current(database):
        raise SettingsError(
            f"the database {database.engine.url} has not the tables of this version: run "
            "`tuner db upgrade`"
        )


def run(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT; a second one interrupts the running trials."""
    worker = Worker(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, worker.stop)
    worker.run()
