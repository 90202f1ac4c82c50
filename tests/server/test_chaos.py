"""Whatever dies, is lost or is full: no trial is lost or doubled, and the plan is the same."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
from sqlalchemy import make_url

from server.client import Client, JobEvent
from server.db import Database, upgrade
from server.jobs import Jobs
from server.settings import Settings
from server.states import ENDED, State
from tests.server.clusters import running_cluster
from tests.server.runs import RECIPES, Bench, child_of, is_gone, until, worker_process, working

_QUICK = {"recipes_dir": RECIPES, "poll_s": 0.1, "kill_after_s": 5.0}
_SHORT_LEASE_S = 3.0
only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
only_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def bench(settings: Settings, jobs: Jobs, database: Database, tmp_path: Path) -> Bench:
    """A service whose leases are short."""
    changes = _QUICK | {"lease_s": _SHORT_LEASE_S}
    return Bench(settings.model_copy(update=changes), jobs, database, tmp_path)


@only_postgresql
def test_a_worker_is_killed_in_the_middle_of_a_trial(bench: Bench) -> None:
    job_id = bench.submit(behaviour="hold", at=3)
    with worker_process(bench.settings) as worker:
        bench.wait_for_mark("acted")
        child = child_of(worker.pid)
        worker.kill()
        until(lambda: is_gone(child), "the job's process ends with its worker")
    assert bench.jobs.get(job_id).state == State.RUNNING
    with working(bench.settings):
        job = bench.wait_for(job_id, *ENDED)
    bench.assert_undisturbed(job_id)
    assert (job.attempt, job.crashes) == (2, 1)
    assert bench.count("evaluated") == len(bench.records(job_id))


def test_a_process_is_killed_between_a_trial_and_its_commit(bench: Bench) -> None:
    job_id = bench.submit(behaviour="hold", at=3)
    with working(bench.settings):
        bench.wait_for_mark("acted")
        child = child_of(os.getpid())
        with _locked(bench, job_id):
            bench.let_go()
            bench.wait_for_mark("evaluated", 4)
            time.sleep(0.3)
            assert not is_gone(child)
            child.kill()
        job = bench.wait_for(job_id, *ENDED)
    bench.assert_undisturbed(job_id)
    assert job.crashes == 1
    assert bench.count("evaluated") == len(bench.records(job_id)) + 1


@contextmanager
def _locked(bench: Bench, job_id: str) -> Iterator[None]:
    """Keep all others from writing to the job."""
    url = make_url(bench.settings.database)
    if bench.database.is_sqlite:
        holder = sqlite3.connect(str(url.database), isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.execute("ROLLBACK")
        holder.close()
        return
    with psycopg.connect(bench.settings.database) as connection:
        connection.execute("SELECT * FROM jobs WHERE id = %s FOR UPDATE", (job_id,))
        yield


@only_postgresql
def test_a_lease_runs_out_while_its_owner_lives(bench: Bench) -> None:
    job_id = bench.submit(behaviour="hold", at=3)
    with worker_process(bench.settings) as worker:
        bench.wait_for_mark("acted")
        child = child_of(worker.pid)
        for pid in (worker.pid, child.pid):
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
        with working(bench.settings):
            job = bench.wait_for(job_id, *ENDED)
        bench.assert_undisturbed(job_id)
        assert job.crashes == 1
        seen = _all_of(bench, job_id)
        bench.let_go()
        child.resume()
        until(lambda: is_gone(child), "the old process ends by itself")
        assert "is no longer held by worker" in bench.told(job_id)
        assert bench.count("evaluated") == len(bench.records(job_id)) + 1
        psutil.Process(worker.pid).resume()
        worker.terminate()
        worker.join()
        assert worker.exitcode == 0
    assert _all_of(bench, job_id) == seen


def _all_of(bench: Bench, job_id: str) -> object:
    """Return all that could be written of a job."""
    files = sorted(bench.settings.artifacts_dir.rglob("*"))
    return (
        bench.jobs.get(job_id).version,
        bench.jobs.last_events([job_id]),
        bench.records(job_id),
        [(path, path.stat().st_mtime_ns) for path in files],
    )


@only_sqlite
def test_sigterm_ends_the_trial_and_gives_the_job_back(bench: Bench) -> None:
    job_id = bench.submit(behaviour="hold", at=3)
    with worker_process(bench.settings) as worker:
        bench.wait_for_mark("acted")
        worker.terminate()
        time.sleep(0.5)
        assert worker.is_alive()
        bench.let_go()
        worker.join()
        assert worker.exitcode == 0
    job = bench.jobs.get(job_id)
    assert (job.state, job.crashes) == (State.QUEUED, 0)
    assert bench.count("evaluated") == len(bench.records(job_id)) == 4
    with working(bench.settings):
        bench.wait_for(job_id, *ENDED)
    bench.assert_undisturbed(job_id)
    assert bench.count("evaluated") == len(bench.records(job_id))


def test_the_server_is_killed_in_the_middle_of_a_stream(bench: Bench) -> None:
    job_id = bench.submit(behaviour="hold", at=3)
    heard: list[JobEvent] = []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def listen() -> None:
        with Client(f"http://127.0.0.1:{port}", retries=30) as client:
            heard.extend(client.events(job_id))

    listener = threading.Thread(target=listen)
    with working(bench.settings):
        with _serving(bench.settings, port) as server:
            listener.start()
            bench.wait_for_mark("acted")
            until(lambda: _streams(port) == 1, "the client listens")
            server.kill()
        bench.let_go()
        bench.wait_for_mark("evaluated", 5)
        with _serving(bench.settings, port):
            bench.wait_for(job_id, *ENDED)
            listener.join()
    bench.assert_undisturbed(job_id)
    assert [(e.id, e.data) for e in heard] == [(e.id, e.data) for e in bench.jobs.events(job_id)]


@contextmanager
def _serving(settings: Settings, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `tuner serve` without a worker."""
    command = [Path(sys.executable).with_name("tuner"), "serve", "--no-worker", "--port", str(port)]
    with subprocess.Popen(command, env=os.environ | settings.environ()) as process:
        try:
            yield process
        finally:
            process.kill()


def _streams(port: int) -> int:
    """Return how many streams the server has."""
    try:
        told = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    except httpx.TransportError:
        return 0
    return int(float(told.partition("\naccutune_event_streams ")[2].partition("\n")[0] or 0))


def test_postgresql_is_restarted_in_the_middle(tmp_path: Path) -> None:
    with running_cluster() as cluster:
        database = Database(cluster.url)
        upgrade(database)
        settings = Settings(data_dir=tmp_path, database_url=cluster.url, lease_s=120.0)
        bench = Bench(settings.model_copy(update=_QUICK), Jobs(database), database, tmp_path)
        job_id = bench.submit(behaviour="hold", at=3)
        with working(bench.settings):
            bench.wait_for_mark("acted")
            cluster.stop()
            bench.let_go()
            bench.wait_for_mark("evaluated", 4)
            time.sleep(1.0)
            cluster.start()
            job = bench.wait_for(job_id, *ENDED)
        bench.assert_undisturbed(job_id)
        assert (job.attempt, job.crashes) == (1, 0)
        assert bench.count("evaluated") == len(bench.records(job_id))
        database.close()


@only_sqlite
def test_a_full_disk_costs_no_evaluation(bench: Bench) -> None:
    with _small_disk(bench.settings.artifacts_dir) as make_room:
        job_id = bench.submit()
        with working(bench.settings):
            until(lambda: bench.jobs.get(job_id).crashes, lambda: bench.told(job_id))
            assert "No space left on device" in bench.losses(job_id)[0]
            make_room()
            job = bench.wait_for(job_id, *ENDED)
        bench.assert_undisturbed(job_id)
        assert job.crashes == 1
        assert bench.count("evaluated") == len(bench.records(job_id))


@contextmanager
def _small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """Mount a small disk that is full; give what makes room on it."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("NO FULL DISK: only root can mount a small one")
    filler = folder / ".filler"
    try:
        filler.write_bytes(b"x" * (4 << 20))
        yield filler.unlink
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
