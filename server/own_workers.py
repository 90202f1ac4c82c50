"""The workers that `tuner serve` runs beside itself."""

import logging
import os
import signal
import subprocess
import sys
import threading
from types import TracebackType

from server.settings import Settings

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_log = logging.getLogger(__name__)


class OwnWorkers:
    """Worker processes that begin and end with this process; one that dies is started again.

    Each is in a session of its own, so that Ctrl-C does not reach it before `drain` does. Its stdin
    is a pipe from this process: when that breaks, however this process ended, the worker drains.
    """

    def __init__(self, settings: Settings, count: int) -> None:
        self.are_draining = False
        self._workers = [_OwnWorker(settings) for _ in range(count)]

    def __enter__(self) -> "OwnWorkers":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.drain()
        for worker in self._workers:
            worker.join()

    @property
    def are_busy(self) -> bool:
        """Whether one of the processes lives."""
        return any(worker.is_alive() for worker in self._workers)

    def drain(self) -> None:
        """Let the running trials end, and then the processes."""
        self.are_draining = True
        for worker in self._workers:
            worker.drain()

    def hurry(self) -> None:
        """Interrupt the running trials of workers that drain; the next attempt begins them anew."""
        for worker in self._workers:
            worker.hurry()


class _OwnWorker(threading.Thread):
    def __init__(self, settings: Settings) -> None:
        super().__init__(name="worker")
        self._environment = os.environ | settings.environ()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()  # a signal may come while this very thread has it
        self._stopping = threading.Event()

    def run(self) -> None:
        """Run the process, and again after it died, each time after a longer pause."""
        pause_s = _FIRST_PAUSE_S
        while self._start():
            assert self._process is not None
            with self._process as process:  # closes its stdin
                code = process.wait()
            if self._stopping.is_set():
                return
            _log.error("the worker ended with code %d: another starts in %g s", code, pause_s)
            self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def drain(self) -> None:
        """Ask the process to end after its trials, once."""
        with self._lock:
            if not self._stopping.is_set():
                self._stopping.set()
                self.hurry()

    def hurry(self) -> None:
        """Ask the process to end; one that was asked before does not wait for its trials."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)  # does nothing where it has ended

    def _start(self) -> bool:
        with self._lock:
            if self._stopping.is_set():
                return False
            self._process = subprocess.Popen(
                # -P: a server.py where the user happens to be is not ours
                [sys.executable, "-P", "-m", "server.own_worker"],
                stdin=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
            return True
