"""What commands say and the codes that they end with."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import typer
from rich.console import Console

from server.client import ClientError, UnreachableError, WaitTimeoutError
from server.errors import ServerError
from server.schemas import Job
from server.states import State
from tuner.cli import BAD_INPUT, MISSED_GOAL

P = ParamSpec("P")

JOB_FAILED = 3
JOB_CANCELLED = 4
UNREACHABLE = 5
NOT_ENDED = 6
INTERRUPTED = 130

err = Console(stderr=True, highlight=False)


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command show the errors of service and client without a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ServerError, ClientError) as error:
            err.print(f"[red bold]error:[/] {type(error).__name__}", end=" ")
            err.print(str(error), markup=False, soft_wrap=True)
            raise typer.Exit(_code(error)) from error

    return run


def code_of(job: Job) -> int:
    """Return the exit code that tells how a job ended."""
    if job.state == State.FAILED:
        return JOB_FAILED
    if job.state == State.CANCELLED:
        return JOB_CANCELLED
    return MISSED_GOAL if job.goal_met is False else 0


@contextmanager
def interruptible(job_id: str) -> Iterator[None]:
    """Let Ctrl-C end the watching, and say that the job itself goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        err.print(f"\njob {job_id} goes on; watch it again: tuner job {job_id} --watch")
        raise typer.Exit(INTERRUPTED) from error


def _code(error: ServerError | ClientError) -> int:
    if isinstance(error, WaitTimeoutError):
        return NOT_ENDED
    return UNREACHABLE if isinstance(error, UnreachableError) else BAD_INPUT
