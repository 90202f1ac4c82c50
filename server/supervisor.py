"""Watches over the process of one job, and says in the job's row what became of it."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from server import leftovers
from server.db.models import JobRow
from server.errand import Errand, ExitCode
from server.errors import DatabaseError, LeaseLostError
from server.jobs import Claim, Jobs
from server.patience import patiently
from server.process_group import ProcessGroup, tail
from server.settings import Settings
from server.states import ENDED, Move, State

_TICK_S = 0.1
_BEATS_PER_LEASE = 3
_TAIL_BYTES = 4000
_LOG_BYTES = 64 << 20
_LONGEST_BACKOFF_S = 60.0
_GIB = 1 << 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job whose process has ended or must end; no move: it is not ours."""

    move: Move | None
    reason: str = ""


class Supervisor:
    """Runs one claimed job in a process group of its own; `run` returns when both have ended.

    The thread of `run` must outlive the process: Linux ends a process with the *thread* that
    started it.
    """

    def __init__(
        self, settings: Settings, jobs: Jobs, claim: Claim, job: JobRow, gpu: str | None = None
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._claim = claim
        self._job = job
        self._gpu = gpu
        self._log_file = settings.logs_dir.absolute() / f"{job.id}-{job.attempt}.log"
        self._started = time.monotonic()
        self._beat_s = min(settings.lease_s / _BEATS_PER_LEASE, settings.poll_s)
        self._beat_at = self._started + self._beat_s
        self._lease_until = self._started + settings.lease_s
        self._drain_until: float | None = None
        self._is_asked = False
        self._kill_at: float | None = None

    def drain(self, within_s: float) -> None:
        """Stop after the running trial, and at the latest in this time; called by any thread."""
        self._drain_until = time.monotonic() + within_s

    def run(self) -> None:
        """Run the job's process to its end, and bring the job's row there."""
        try:
            verdict = self._verdict()
        except OSError as error:
            verdict = Verdict(Move.LOSE, f"its process could not be started: {error}")
        self._conclude(verdict)
        self._clean_up()

    def _verdict(self) -> Verdict:
        group = ProcessGroup(self._command(), self._environ(), self._log_file)
        try:
            return self._watched(group)
        finally:
            group.kill()

    def _command(self) -> list[str]:
        errand = Errand(self._claim, os.getpid(), self._log_file)
        # -P: a server.py where the worker happens to be is not ours
        return [sys.executable, "-P", "-m", "server.runner", *errand.arguments()]

    def _environ(self) -> Mapping[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ACCUTUNE_")}
        # The order of sets of strings must be that of the attempts before.
        environ = inherited | self._settings.environ() | {"PYTHONHASHSEED": "0"}
        return environ if self._gpu is None else environ | {"CUDA_VISIBLE_DEVICES": self._gpu}

    def _watched(self, group: ProcessGroup) -> Verdict:
        while (code := group.wait(_TICK_S)) is None:
            verdict = self._by_lease(group) or self._by_limits(group) or self._by_drain(group)
            if verdict is not None:
                return verdict
        verdict = self._of_exit(code)
        return self._after_pause(group, verdict) if code == ExitCode.RETRY else verdict

    def _by_lease(self, group: ProcessGroup) -> Verdict | None:
        """Renew the lease when that is due, and do what the job's state asks for."""
        moment = time.monotonic()
        if moment < self._beat_at:
            return None
        self._beat_at = moment + self._beat_s
        try:
            state = self._jobs.renew(self._claim, self._settings.lease_s)
        except LeaseLostError as error:
            _log.info("%s", error)
            return Verdict(None)
        except DatabaseError as error:
            _log.warning("the lease of job %s cannot be renewed: %s", self._claim.job_id, error)
            return Verdict(None) if moment >= self._lease_until else None
        self._lease_until = moment + self._settings.lease_s
        if state == State.PAUSING:
            self._ask(group)
        elif state == State.CANCELLING:
            self._interrupt(group)
        return None

    def _by_limits(self, group: ProcessGroup) -> Verdict | None:
        group.trim_log(_LOG_BYTES)
        limit_s, limit_bytes = self._job.timeout_s, self._settings.memory_limit_bytes
        if limit_s is not None and self._spent_s() > limit_s:
            return Verdict(Move.FAIL, f"the job needed more than its timeout_s of {limit_s:g}")
        if limit_bytes is not None and group.memory_bytes() > limit_bytes:
            limit = f"{limit_bytes / _GIB:.2f} GiB"
            return Verdict(Move.LOSE, f"needed more than {limit} of memory, the worker's limit")
        return None

    def _by_drain(self, group: ProcessGroup) -> Verdict | None:
        moment = time.monotonic()
        if self._drain_until is not None:
            self._ask(group)
            if moment >= self._drain_until:
                self._interrupt(group)
        if self._kill_at is not None and moment >= self._kill_at:
            return Verdict(Move.RELEASE)
        return None

    def _clean_up(self) -> None:
        try:
            job = self._jobs.get(self._claim.job_id)
        except DatabaseError:  # the worker does it when the job's lease runs out
            return
        if job.state in ENDED:
            leftovers.clear(self._settings, job.id)

    def _spent_s(self) -> float:
        return self._job.spent_s + time.monotonic() - self._started

    def _ask(self, group: ProcessGroup) -> None:
        if not self._is_asked:
            self._is_asked = True
            group.ask()

    def _interrupt(self, group: ProcessGroup) -> None:
        if self._kill_at is None:
            self._is_asked = True
            self._kill_at = time.monotonic() + self._settings.kill_after_s
            group.interrupt()

    def _of_exit(self, code: int) -> Verdict:
        if code == ExitCode.LEASE_LOST:
            return Verdict(None)
        if code == ExitCode.STOPPED or (self._is_asked and code in _ASKED):
            return Verdict(Move.RELEASE)
        lines = tail(self._log_file, _TAIL_BYTES)
        return Verdict(Move.LOSE, f"its process {_described(code)}:\n{lines}")

    def _after_pause(self, group: ProcessGroup, verdict: Verdict) -> Verdict:
        """Hold the job for a while before it is tried again: disk or database may come back."""
        pause_s = min(self._settings.poll_s * 2**self._job.attempt, _LONGEST_BACKOFF_S)
        until = time.monotonic() + pause_s
        while time.monotonic() < until and self._drain_until is None and self._kill_at is None:
            time.sleep(_TICK_S)
            if self._by_lease(group) is not None:
                return Verdict(None)
        return verdict

    def _conclude(self, verdict: Verdict) -> None:
        """Write the verdict, unless the job is another's by now, or has ended."""
        if verdict.move is None:
            return
        write = self._writer(verdict)
        try:
            patiently(write, max(self._lease_until - time.monotonic(), 0.0))
            _log.info("job %s: %s %s", self._claim.job_id, verdict.move, verdict.reason)
        except LeaseLostError:
            return
        except DatabaseError as error:  # its lease runs out, and another attempt follows
            _log.error("job %s cannot be given back: %s", self._claim.job_id, error)

    def _writer(self, verdict: Verdict) -> Callable[[], None]:
        if verdict.move == Move.RELEASE:
            return partial(self._jobs.release, self._claim)
        if verdict.move == Move.FAIL:
            return partial(self._jobs.fail, self._claim, verdict.reason)
        return partial(self._jobs.lose, self._claim, verdict.reason)


_ASKED = (-signal.SIGTERM, -signal.SIGINT, ExitCode.INTERRUPTED)


def _described(code: int) -> str:
    if code == ExitCode.DONE:
        return "ended without a result"
    if code < 0:
        named = {int(one): one.name for one in signal.Signals}
        return f"was killed by {named.get(-code, f'signal {-code}')}"
    return f"ended with exit code {code}"
