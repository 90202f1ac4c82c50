"""Supervisor: what becomes of a job whose process ends, or must end, in every way."""

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.db import Database
from server.db.models import JobRow
from server.errand import ExitCode
from server.jobs import Claim, Jobs
from server.process_group import ProcessGroup
from server.settings import Settings
from server.states import Move, State
from server.supervisor import Supervisor
from tests.server.helpers import submission

_PATIENCE_S = 30.0
FOREVER = "import time; print('ready', flush=True); time.sleep(600)"
STUBBORN = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(600)
"""
OBEDIENT = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({ExitCode.STOPPED}))
print('ready', flush=True)
time.sleep(600)
"""
WITH_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print('ready', child.pid, flush=True)
time.sleep(600)
"""
GREEDY = """
import subprocess, sys, time
eat = "x = b'x' * (40 << 20); import time; time.sleep(600)"
children = [subprocess.Popen([sys.executable, '-c', eat]) for _ in range(3)]
time.sleep(600)
"""


class Scripted(Supervisor):
    """Runs a script where the job would be."""

    script = FOREVER

    def _command(self) -> list[str]:
        return [sys.executable, "-c", self.script]


class Run:
    """One job under a supervisor, in a thread of its own."""

    def __init__(self, settings: Settings, jobs: Jobs, script: str, **fields: Any) -> None:
        self.jobs = jobs
        self.id = jobs.submit(submission(**fields), "local")[0].id
        self.settings = settings
        self.claim, job = _claimed(jobs)
        self.supervisor = Scripted(settings, jobs, self.claim, job)
        self.supervisor.script = script
        self.thread = threading.Thread(target=self.supervisor.run)
        self.thread.start()

    @property
    def log(self) -> str:
        path = self.settings.logs_dir / f"{self.id}-1.log"
        return path.read_text() if path.exists() else ""

    def ready(self) -> "Run":
        """Wait until the script says so."""
        until = time.monotonic() + _PATIENCE_S
        while "ready" not in self.log:
            assert time.monotonic() < until
            time.sleep(0.02)
        return self

    def ended(self) -> JobRow:
        """Wait for the supervisor's end; return the job."""
        self.thread.join(_PATIENCE_S)
        assert not self.thread.is_alive()
        return self.jobs.get(self.id)


@pytest.fixture
def database_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """SQLite: what a supervisor does is the same on both."""
    shutil.copy(_sqlite_template, tmp_path / "accutune.db")
    return f"sqlite:///{tmp_path / 'accutune.db'}"


@pytest.fixture
def quick(settings: Settings) -> Settings:
    """Settings under which everything happens at once."""
    return settings.model_copy(update={"poll_s": 0.05, "lease_s": 20.0, "kill_after_s": 0.3})


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("print('last words'); raise SystemExit(3)", "ended with exit code 3"),
        ("import os; print('last words', flush=True); os.kill(os.getpid(), 11)", "by SIGSEGV"),
        ("import os; print('last words', flush=True); os.kill(os.getpid(), 40)", "by signal 40"),
        ("print('last words')", "ended without a result"),
        (f"print('last words'); raise SystemExit({ExitCode.RETRY})", "ended with exit code 75"),
    ],
)
def test_a_crash_counts_and_says_why(script: str, told: str, quick: Settings, jobs: Jobs) -> None:
    job = Run(quick, jobs, script, max_attempts=1).ended()
    assert job.state == State.FAILED
    assert job.error is not None
    assert told in job.error
    assert "last words" in job.error


def test_a_crash_is_tried_again_while_attempts_are_left(quick: Settings, jobs: Jobs) -> None:
    job = Run(quick, jobs, "raise SystemExit(1)", max_attempts=2).ended()
    assert (job.state, job.crashes) == (State.QUEUED, 1)


def test_pausing_asks_the_process_to_stop(quick: Settings, jobs: Jobs) -> None:
    run = Run(quick, jobs, OBEDIENT).ready()
    jobs.ask(run.id, Move.PAUSE)
    job = run.ended()
    assert (job.state, job.crashes) == (State.PAUSED, 0)


def test_pausing_waits_for_a_process_that_is_busy(quick: Settings, jobs: Jobs) -> None:
    run = Run(quick, jobs, STUBBORN).ready()
    jobs.ask(run.id, Move.PAUSE)
    time.sleep(3 * quick.kill_after_s)
    assert run.thread.is_alive()
    jobs.ask(run.id, Move.CANCEL)
    assert run.ended().state == State.CANCELLED


@pytest.mark.parametrize("script", [FOREVER, STUBBORN])
def test_cancelling_interrupts_then_kills(script: str, quick: Settings, jobs: Jobs) -> None:
    run = Run(quick, jobs, script).ready()
    jobs.ask(run.id, Move.CANCEL)
    began = time.monotonic()
    job = run.ended()
    assert (job.state, job.crashes) == (State.CANCELLED, 0)
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize("script", [OBEDIENT, STUBBORN])
def test_draining_gives_the_job_back_unharmed(script: str, quick: Settings, jobs: Jobs) -> None:
    run = Run(quick, jobs, script).ready()
    run.supervisor.drain(0.3)
    job = run.ended()
    assert (job.state, job.crashes) == (State.QUEUED, 0)


def test_a_lost_lease_kills_the_group_and_writes_nothing(quick: Settings, jobs: Jobs) -> None:
    run = Run(quick, jobs, WITH_A_CHILD).ready()
    child = int(run.log.split()[1])
    jobs.release(run.claim)
    other, _ = _claimed(jobs)
    before = jobs.get(run.id).version
    job = run.ended()
    assert (job.state, job.fence, job.version) == (State.RUNNING, other.fence, before)
    _assert_gone(child)


def test_a_job_may_not_run_longer_than_its_time(quick: Settings, jobs: Jobs) -> None:
    job = Run(quick, jobs, FOREVER, timeout_s=0.5).ended()
    assert job.state == State.FAILED
    assert job.error == "the job needed more than its timeout_s of 0.5"


def test_earlier_attempts_count_against_the_time(
    quick: Settings, jobs: Jobs, database: Database
) -> None:
    job, _ = jobs.submit(submission(timeout_s=3600), "local")
    with database.writing() as session:
        session.get_one(JobRow, job.id).spent_s = 3599.5
    supervisor = Scripted(quick, jobs, *_claimed(jobs))
    supervisor.run()
    assert jobs.get(job.id).state == State.FAILED


def test_descendants_count_against_the_memory(quick: Settings, jobs: Jobs) -> None:
    limited = quick.model_copy(update={"memory_limit_bytes": 120 << 20})
    job = Run(limited, jobs, GREEDY, max_attempts=1).ended()
    assert job.state == State.FAILED
    assert job.error is not None
    assert "needed more than 0.12 GiB of memory" in job.error


def test_a_process_that_cannot_be_started_is_a_crash(
    quick: Settings, jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    nowhere = quick.model_copy(update={"data_dir": tmp_path / "file"})
    job = Run(nowhere, jobs, FOREVER, max_attempts=1).ended()
    assert job.state == State.FAILED
    assert job.error is not None
    assert "could not be started" in job.error


def test_a_process_has_its_device_and_the_workers_settings(
    quick: Settings, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCUTUNE_MEMORY_LIMIT_BYTES", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    show = (
        "import os; from server.settings import Settings; "
        "print(os.environ.get('CUDA_VISIBLE_DEVICES'), Settings().model_dump_json())"
    )
    told = {}
    for gpu in (None, "", "3"):
        job, _ = jobs.submit(submission(max_attempts=1), "local")
        supervisor = Scripted(quick, jobs, *_claimed(jobs), gpu=gpu)
        supervisor.script = show
        supervisor.run()
        log = (quick.logs_dir / f"{job.id}-1.log").read_text()
        told[gpu], _, shown = log.partition(" ")
    assert told == {None: "None", "": "", "3": "3"}
    assert Settings.model_validate_json(shown) == quick.model_copy(
        update={"data_dir": quick.data_dir.absolute()}
    )


def test_without_its_database_a_job_is_left_when_its_lease_is_gone(quick: Settings) -> None:
    away = Jobs(Database("postgresql://postgres@127.0.0.1:1/none"))
    job = JobRow(id="0" * 26, attempt=1, spent_s=0.0, timeout_s=None)
    short = quick.model_copy(update={"lease_s": 1.0})
    supervisor = Scripted(short, away, Claim(job.id, "w", 1), job)
    began = time.monotonic()
    supervisor.run()
    assert 1.0 <= time.monotonic() - began < 20.0


def test_a_log_that_grows_too_long_begins_anew(tmp_path: Path) -> None:
    script = "import time; print('x' * 10000, flush=True); time.sleep(1); print('end')"
    log = tmp_path / "logs" / "log"
    group = ProcessGroup([sys.executable, "-c", script], {}, log)
    while log.stat().st_size < 10_000:
        time.sleep(0.02)
    group.trim_log(20_000)
    assert log.stat().st_size == 10_001
    group.trim_log(5_000)
    assert group.wait(_PATIENCE_S) == 0
    assert log.read_text() == "end\n"


def _claimed(jobs: Jobs) -> tuple[Claim, JobRow]:
    found = jobs.claim("w", 20.0)
    assert found is not None
    return found


def _assert_gone(pid: int) -> None:
    until = time.monotonic() + _PATIENCE_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)
