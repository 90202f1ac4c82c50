"""What the service bears: submissions, claims, streams, long jobs, and its memory.

The server is a process of its own, as `tuner serve` starts it; what asks it runs beside it on the
same machine, so the figures are those of both.
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import machine
import psutil
import psycopg
import tables
from sqlalchemy import make_url

from server.db import Database, upgrade
from server.jobs import Claim, Ending, Jobs
from server.schemas import Submission
from tuner.plan import Plan
from tuner.records import TrialRecord
from tuner.schemes import OpConfig, TensorScheme
from tuner.storage import Storage, StudyHeader, StudyStore

_POSTGRESQL = "postgresql://postgres@127.0.0.1:5432/postgres"
_BODY = {"recipe": "digits-resnet", "params": {"epochs": 1}}
_LEASE_S = 600.0
_HEADER = StudyHeader(model="m", space="s", strategy="auto", seed=0)
_OPS = 50  # of a plan
_PAGE = 100


@dataclass(frozen=True)
class Server:
    """A running `tuner serve` without a worker."""

    url: str
    pid: int
    database: Database

    @property
    def jobs(self) -> Jobs:
        """The queue behind it."""
        return Jobs(self.database)

    def connection(self) -> http.client.HTTPConnection:
        """Return a connection that stays open."""
        address = urlsplit(self.url)
        assert address.hostname is not None
        return http.client.HTTPConnection(address.hostname, address.port, timeout=120)

    def resident_mib(self) -> float:
        """Return the server's resident memory."""
        return float(psutil.Process(self.pid).memory_info().rss / 2**20)


@contextmanager
def running(database_url: str, folder: Path) -> Iterator[Server]:
    """Run a server until the block ends."""
    database = Database(database_url)
    upgrade(database)
    environ = os.environ | {
        "ACCUTUNE_DATABASE_URL": database_url,
        "ACCUTUNE_REQUESTS_PER_MINUTE": "1000000000",
        "ACCUTUNE_MAX_QUEUED_JOBS": "1000000",
        "COLUMNS": "200",
    }
    command = [Path(sys.executable).with_name("tuner"), "serve", "--port", "0", "--no-worker"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", folder],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None, (folder / "log").read_text()
            yield Server(found[0], process.pid, database)
        finally:
            process.terminate()
            process.wait()
            database.close()


def submissions(server: Server, count: int, clients: int = 8) -> float:
    """Return the jobs that clients submit in a second, one request at a time each."""
    body = json.dumps(_BODY)

    def submit(number: int) -> None:
        connection = server.connection()
        for _ in range(number):
            _ask(connection, "POST", "/v1/jobs", body, {"Content-Type": "application/json"})

    submit(10)
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(submit, [count // clients] * clients))
    return count // clients * clients / (time.perf_counter() - started)


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: str | None = None,
    headers: dict[str, str] | None = None,
) -> bytes:
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status < 400, content
    return content


def claims(database_url: str, count: int, workers: int = 20) -> float:
    """Return the jobs a second that worker processes claim, renew and end, each exactly once."""
    database = Database(database_url)
    jobs = Jobs(database)
    submission = Submission(**_BODY)  # type: ignore[arg-type]
    wanted = {jobs.submit(submission, f"owner-{n % 5}")[0].id for n in range(count)}
    context = get_context("fork")  # to import torch once
    ready, gate, done = context.Semaphore(0), context.Event(), context.Queue()
    processes = [
        context.Process(target=_work, args=(database_url, f"w{n}", ready, gate, done))
        for n in range(workers)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    started = time.perf_counter()
    gate.set()
    ended = [job_id for _ in processes for job_id in done.get()]
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    times = Counter(ended)
    assert wanted <= set(times)
    assert set(times.values()) == {1}
    assert {jobs.get(job_id).attempt for job_id in wanted} == {1}
    database.close()
    return len(ended) / seconds


def _work(database_url: str, name: str, ready: Any, gate: Any, done: Any) -> None:
    database = Database(database_url)
    jobs = Jobs(database)
    ready.release()
    gate.wait()
    mine = []
    while (found := jobs.claim(name, _LEASE_S)) is not None:
        claim, _ = found
        jobs.renew(claim, _LEASE_S)
        jobs.succeed(claim, Ending(None, None, False, 0, "max_trials"))
        mine.append(claim.job_id)
    done.put(mine)
    database.close()


def streams(server: Server, claim: Claim, clients: int, trials: int) -> tuple[float, float]:
    """Return the median and the longest time from a trial's commit to a client, in seconds."""
    arrivals: list[list[float]] = [[] for _ in range(clients)]
    opened = threading.Semaphore(0)

    def listen(times: list[float]) -> None:
        connection = server.connection()
        connection.request("GET", f"/v1/jobs/{claim.job_id}/events")
        answer = connection.getresponse()
        opened.release()
        while len(times) < trials:
            if answer.readline() == b"event: trial\n":
                times.append(time.perf_counter())
        connection.close()

    threads = [threading.Thread(target=listen, args=(times,)) for times in arrivals]
    for thread in threads:
        thread.start()
    for _ in threads:
        opened.acquire()
    stored = []
    for _ in _trials(server, claim, range(trials)):
        stored.append(time.perf_counter())
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    late = [came - left for times in arrivals for came, left in zip(times, stored, strict=True)]
    return median(late), max(late)


def pages(server: Server, trials: int) -> dict[str, float]:
    """Return the seconds in which pages of a job with very many trials come; medians."""
    claim = _claimed(server.jobs)
    for _ in _trials(server, claim, range(trials + 1)):
        pass
    connection = server.connection()
    path: str | None = f"/v1/jobs/{claim.job_id}/trials?limit={_PAGE}"
    seconds = []
    numbers: list[int] = []
    while path is not None:
        took, content = _timed(lambda p=path: _ask(connection, "GET", p))
        page = json.loads(content)
        seconds.append(took)
        numbers += [item["number"] for item in page["items"]]
        cursor = page["next_cursor"]
        path = cursor and f"/v1/jobs/{claim.job_id}/trials?limit={_PAGE}&cursor={cursor}"
    assert numbers == list(range(1, trials + 1))

    def often(path: str) -> float:
        return median(_timed(lambda: _ask(connection, "GET", path))[0] for _ in range(9))

    return {
        "page_s": median(seconds),
        "slowest_page_s": max(seconds),
        "one_trial_s": often(f"/v1/jobs/{claim.job_id}/trials/{trials // 2}"),
        "dashboard_s": often(f"/jobs/{claim.job_id}"),
    }


def memory(server: Server, job_id: str, requests: int, clients: int = 4) -> tuple[float, float]:
    """Return the server's MiB after a tenth of the requests, and after all."""
    paths = [
        "/v1/jobs?limit=20",
        f"/v1/jobs/{job_id}",
        f"/v1/jobs/{job_id}/trials?limit=20",
        "/v1/recipes",
        "/",
        f"/jobs/{job_id}",
        "/metrics",
        "/healthz",
    ]

    def ask(number: int) -> None:
        connection = server.connection()
        for position in range(number):
            _ask(connection, "GET", paths[position % len(paths)])

    def ask_all(number: int) -> float:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(ask, [number // clients] * clients))
        return server.resident_mib()

    return ask_all(requests // 10), ask_all(requests - requests // 10)


def _claimed(jobs: Jobs) -> Claim:
    job, _ = jobs.submit(Submission(**_BODY, priority=1000), "stream")  # type: ignore[arg-type]
    while True:
        found = jobs.claim("bench", _LEASE_S)
        assert found is not None
        if found[0].job_id == job.id:
            return found[0]
        jobs.succeed(found[0], Ending(None, None, False, 0, "max_trials"))


def _trials(server: Server, claim: Claim, numbers: Sequence[int]) -> Iterator[int]:
    """Store trials as a worker does, and yield each number after its commit."""
    jobs = server.jobs
    storage = Storage(server.database.url, partial(jobs.store_trial, claim))
    study = StudyStore.open(storage, jobs.get(claim.job_id).study_name, _HEADER)
    try:
        for number in numbers:
            study.add(number, _record(number))
            yield number
    finally:
        study.close()


def _record(number: int) -> dict[str, Any]:
    configs = (OpConfig.float(), OpConfig(weight=TensorScheme(format="int8")))
    plan = Plan({f"blocks.{n}.fc": configs[(number >> n % 13) & 1] for n in range(_OPS)})
    return TrialRecord(
        number=number,
        plan=plan,
        accuracy=0.9,
        metrics={"accuracy": 0.9},
        costs={"size_bytes": 1e6 / (number + 1), "bops": 1e9 / (number + 1)},
        meets_goal=True,
        state="complete",
        duration_s=0.5,
        reason=f"trial {number}",
        scores=None,
    ).to_dict()


def _timed(call: Callable[[], bytes]) -> tuple[float, bytes]:
    started = time.perf_counter()
    content = call()
    return time.perf_counter() - started, content


@contextmanager
def _database(kind: str, folder: Path, url: str) -> Iterator[str]:
    """Give the URL of an empty database."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'accutune.db'}"
        return
    name = f"bench_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            yield make_url(url).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def measure(kind: str, url: str, scale: float) -> dict[str, Any]:
    """Measure everything on one kind of database."""
    surroundings = machine.describe()
    with (
        tempfile.TemporaryDirectory() as name,
        _database(kind, Path(name), url) as database_url,
    ):
        row: dict[str, Any] = {"model": f"service-{kind}", "database": kind, "scale": scale}
        with running(database_url, Path(name)) as server:
            row["submissions_per_s"] = submissions(server, int(2000 * scale))
            claim = _claimed(server.jobs)
            late = streams(server, claim, 100, int(100 * scale))
            row["stream_s"], row["slowest_stream_s"] = late
            row |= pages(server, int(10_000 * scale))
            row["first_mib"], row["last_mib"] = memory(server, claim.job_id, int(20_000 * scale))
        row["claims_per_s"] = claims(database_url, int(1000 * scale))
    return row | {"machine": surroundings}


def main() -> None:
    """Measure on the databases that the arguments name, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", nargs="+", default=("sqlite", "postgresql"))
    parser.add_argument("--postgresql", default=_POSTGRESQL, help="may create databases")
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts")
    arguments = parser.parse_args()
    for kind in arguments.databases:
        row = measure(kind, arguments.postgresql, arguments.scale)
        print(json.dumps(row, indent=2), flush=True)
        if arguments.scale == 1:
            tables.append(row, tables.SERVICE)
    tables.render()


if __name__ == "__main__":
    main()
