"""Waiting for a job to end."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from server.client.calls import Call, job_if_changed
from server.client.errors import UnavailableError, UnreachableError, WaitTimeoutError
from server.schemas import Job
from server.states import ENDED
from tuner.report import text

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_PATIENCE_S = 300.0


class Waiting:
    """When to look at a job again, and until when. A service that restarts is waited for."""

    def __init__(self, job_id: str, timeout_s: float | None) -> None:
        self._job_id = job_id
        self._timeout_s = timeout_s
        self._begin_s = time.monotonic()
        self._answered_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._etag: str | None = None
        self._job: Job | None = None

    @property
    def call(self) -> Call[tuple[Job | None, str | None]]:
        """The request that asks whether something has changed."""
        return job_if_changed(self._job_id, self._etag)

    def take(self, answer: tuple[Job | None, str | None]) -> Job:
        """Return the job as it is now."""
        job, self._etag = answer
        if job is not None:
            self._job, self._pause_s = job, _FIRST_PAUSE_S
        self._answered_s = time.monotonic()
        assert self._job is not None  # without a tag there is no answer without a job
        return self._job

    def forgive(self, error: UnreachableError | UnavailableError) -> None:
        """Raise the error if there was no answer ever, or for long."""
        if self._answered_s is None or time.monotonic() - self._answered_s > _PATIENCE_S:
            raise error

    def pause_s(self) -> float:
        """Return how long to wait; raises WaitTimeoutError when the time is up."""
        pause_s, self._pause_s = self._pause_s, min(1.5 * self._pause_s, _LONGEST_PAUSE_S)
        if self._timeout_s is None:
            return pause_s
        left_s = self._begin_s + self._timeout_s - time.monotonic()
        if left_s <= 0:
            state = "not known" if self._job is None else self._job.state
            raise WaitTimeoutError(
                f"job {self._job_id} has not ended within {self._timeout_s:g} s (its state is "
                f"{state}): it goes on, wait for it again"
            )
        return min(pause_s, left_s)


class Display:
    """A bar of a job's trials on stderr, with its best so far.

    `enabled` None shows it on a terminal only; True prints lines where there is no terminal.
    """

    def __init__(self, enabled: bool | None = None, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._enabled = self._console.is_terminal if enabled is None else enabled
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed} of at most {task.total} trials"),
            TextColumn("{task.fields[best]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not (self._enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("waiting", total=None, best="")
        self._line = ""

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, job: Job) -> None:
        """Show a job as it is now."""
        done, total = job.progress.trials, job.progress.max_trials
        best = describe_best(job)
        self._bar.update(self._task, description=job.state, completed=done, total=total, best=best)
        line = f"{job.state}: {done} of at most {total} trials  {best}".rstrip()
        if self._enabled and not self._console.is_terminal and line != self._line:
            self._console.print(line, soft_wrap=True, markup=False)
        self._line = line


def describe_best(job: Job) -> str:
    """Return a job's best trial in a few words."""
    if job.best is None or job.best.get("accuracy") is None:
        return ""
    costs = job.best.get("costs") or {}
    size = costs.get("size_bytes")
    shown = "" if size is None else f", {text.size(float(size))}"
    met = "" if job.best.get("meets_goal") else ", goal missed"
    return f"best: {text.number(float(job.best['accuracy']))}{shown}{met}"


def has_ended(job: Job) -> bool:
    """Return whether a job is in one of its end states."""
    return job.state in ENDED
