"""A worker's row in the table of workers, and the thread that keeps it fresh."""

import logging
import os
import socket
import threading
from datetime import timedelta

from sqlalchemy import delete
from sqlalchemy.exc import SQLAlchemyError

from server.db import Database, now
from server.db.models import WorkerRow
from server.errors import DatabaseError
from server.ids import new_id
from server.settings import Settings
from tuner.version import VERSION

_KEPT_DAYS = 7
_BEATS_PER_LEASE = 3
_log = logging.getLogger(__name__)


class Heartbeat:
    """Tells the table that a worker is there: `running`, then `draining`, then `ended`."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.worker_id = new_id()
        self._settings = settings
        self._database = database
        self._state = "running"
        self._changed = threading.Event()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the row and go on; forget workers that have been silent for days."""
        with self._database.writing() as session:
            oldest = now(session) - timedelta(days=_KEPT_DAYS)
            session.execute(delete(WorkerRow).where(WorkerRow.heartbeat_at < oldest))
        self.beat()
        self._thread.start()

    def drain(self) -> None:
        """Say that the worker takes no more jobs."""
        self._state = "draining"
        self._changed.set()

    def end(self) -> None:
        """Say that the worker has ended."""
        self._state = "ended"
        self._has_ended.set()
        self._changed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def beat(self) -> None:
        """Write the row; it may have been deleted."""
        with self._database.writing() as session:
            row = session.get(WorkerRow, self.worker_id)
            moment = now(session)
            if row is None:
                row = self._row()
                row.started_at = moment
                session.add(row)
            row.state, row.heartbeat_at = self._state, moment

    def _row(self) -> WorkerRow:
        return WorkerRow(
            id=self.worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self._settings.slots,
            gpus=list(self._settings.gpus),
            version=VERSION,
        )

    def _run(self) -> None:
        while not self._has_ended.is_set():
            self._changed.wait(self._settings.lease_s / _BEATS_PER_LEASE)
            self._changed.clear()
            try:
                self.beat()
            except (DatabaseError, SQLAlchemyError) as error:  # the next one may get through
                _log.warning("the heartbeat cannot be written: %s", error)
