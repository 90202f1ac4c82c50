"""The commands of the service, against a service that listens."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from typer.testing import CliRunner, Result

from server.auth import Scope
from server.cli import app
from server.client import Client
from server.commands.outcome import JOB_CANCELLED, JOB_FAILED, UNREACHABLE
from server.jobs import Jobs
from server.schemas import WorkerInfo
from server.services import Services
from server.settings import Settings
from server.states import State
from server.workers import listed
from tests.server.access import on_sqlite
from tests.server.helpers import claimed, record, store, submission, succeeded
from tests.server.live import service
from tuner.cli import BAD_INPUT, MISSED_GOAL
from tuner.errors import TunerError

Run = Callable[..., Result]
START_S = 120.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, plain_root: logging.Logger) -> Run:
    """Runs a command; errors that tuner.cli.run shows are raised."""
    monkeypatch.setattr("server.commands.jobs._RETRIES", 0)

    def command(*arguments: str) -> Result:
        result = CliRunner().invoke(app, arguments)
        if isinstance(result.exception, Exception):
            raise result.exception
        return result

    return command


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """A service that listens where ACCUTUNE_URL says."""
    with service(on_sqlite(tmp_path / "data")) as (url, application):
        monkeypatch.setenv("ACCUTUNE_URL", url)
        yield application.state.services


def test_a_job_is_submitted_as_the_options_say(run: Run, services: Services) -> None:
    options = ["-p", "epochs=3", "--space", "mixed-int", "--goal", "2%", "--max-trials", "9"]
    options += ["--label", "team=vision", "--priority", "4", "--objective", "size", "--key", "k"]
    job_id = run("submit", "digits-resnet", *options).stdout.strip()
    row = services.jobs.get(job_id)
    assert (row.params, row.labels, row.priority) == ({"epochs": 3}, {"team": "vision"}, 4)
    goal = {"max_drop": row.config["goal"]["max_drop"], "space": row.config["space"]}
    assert goal == {"max_drop": 0.02, "space": "mixed-int"}
    assert (row.config["max_trials"], row.config["objective"]) == (9, "size")
    assert run("submit", "digits-resnet", *options).stdout.strip() == job_id


def test_options_go_before_the_file(run: Run, services: Services, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"space": "fp8", "seed": 3}')
    arguments = ("submit", "digits-resnet", "--config", str(path), "--space", "mx", "--json")
    job = json.loads(run(*arguments).stdout)
    assert (job["config"]["space"], job["config"]["seed"]) == ("mx", 3)
    path.write_text("[]")
    with pytest.raises(TunerError, match="holds no TuningConfig"):
        run(*arguments)
    with pytest.raises(TunerError, match="give KEY=VALUE"):
        run("submit", "digits-resnet", "-p", "epochs")


def end_badly(jobs: Jobs, url: str) -> None:
    """Let the job that waits fail."""
    claim = claimed(jobs)
    store(jobs, claim, url, [record(0)])
    jobs.fail(claim, "Traceback [red]\nValueError: no luck")


def test_waiting_tells_how_the_job_ended(run: Run, services: Services) -> None:
    url = services.settings.database

    def work() -> None:
        deadline = time.monotonic() + 30
        while not services.jobs.page(1, states=[State.QUEUED]) and time.monotonic() < deadline:
            time.sleep(0.05)
        end_badly(services.jobs, url)

    thread = threading.Thread(target=work)
    thread.start()
    result = run("submit", "digits-resnet", "--wait")
    thread.join()
    assert result.exit_code == JOB_FAILED
    assert "ValueError: no luck" in result.stdout
    assert "[red]" in result.stdout
    job_id = services.jobs.page(1)[0].id
    watched = run("job", job_id[-6:], "--watch")
    assert watched.exit_code == JOB_FAILED
    assert [line.split()[0] for line in watched.stdout.splitlines()[:3]] == [
        "queued",
        "running",
        "baseline",
    ]
    assert run("job", job_id).exit_code == 0


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, MISSED_GOAL)])
def test_a_missed_goal_has_its_own_code(run: Run, services: Services, met: bool, code: int) -> None:
    job_id = succeeded(services.jobs, services.settings.database, goal_met=met)
    assert run("job", job_id, "--watch").exit_code == code


def test_jobs_and_trials_are_shown(run: Run, services: Services) -> None:
    job_id = succeeded(services.jobs, services.settings.database)
    services.jobs.submit(submission(labels={"team": "vision"}), "local")
    assert len(run("jobs").stdout.splitlines()) == 3
    assert len(run("jobs", "--limit", "1", "--json").stdout.splitlines()) == 1
    labelled = run("jobs", "--label", "team=vision", "--state", "queued", "--json").stdout
    assert [json.loads(line)["labels"] for line in labelled.splitlines()] == [{"team": "vision"}]
    shown = run("trials", job_id).stdout.splitlines()
    assert shown[1].split()[:4] == ["0", "0.9", "met", "100.00%"]
    assert shown[4].split()[:5] == ["3", "0.9", "met", "25.00%", "25.00%"]
    numbers = [
        json.loads(line)["number"] for line in run("trials", job_id, "--json").stdout.splitlines()
    ]
    assert numbers == [1, 2, 3]
    assert "25.00% of FP32's bops" in run("job", job_id).stdout
    assert "digits-resnet" in run("recipes").stdout


def test_a_job_is_paused_resumed_and_cancelled(run: Run, services: Services) -> None:
    job_id = services.jobs.submit(submission(), "local")[0].id
    for command, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert run(command, job_id[-5:]).stdout.strip() == f"{job_id} {state}"
    assert run("job", job_id, "--watch").exit_code == JOB_CANCELLED
    assert run("resume", job_id).exit_code == BAD_INPUT


def test_an_id_must_be_of_one_job(run: Run, services: Services) -> None:
    ids = [services.jobs.submit(submission(), "local")[0].id for _ in range(2)]
    assert json.loads(run("job", ids[0][-8:].upper(), "--json").stdout)["id"] == ids[0]
    for given, reason in (
        (ids[0][:6], "2 jobs have an id"),
        ("0000", "no job has"),
        ("0", "short"),
    ):
        result = run("cancel", given)
        assert result.exit_code == BAD_INPUT
        assert reason in result.stderr
    assert all(job.state == "queued" for job in services.jobs.page(2))


def test_a_file_is_sent_for_recipes_to_use(run: Run, services: Services, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, inputs=np.zeros(3, np.float32))
    sent = run("upload", str(path)).stdout.strip()
    assert sent == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads(run("upload", str(path), "--json").stdout)["kind"] == "npz"
    for name, reason in {"none.npz": "cannot be read", "model.pt": "give a .safetensors"}.items():
        refused = run("upload", str(tmp_path / name))
        assert refused.exit_code == BAD_INPUT
        assert reason in refused.stderr


def test_errors_have_their_own_codes(run: Run, services: Services) -> None:
    result = run("submit", "digits-resnet", "-p", "epochs=-1")
    assert result.exit_code == BAD_INPUT
    assert "/params/epochs" in result.stderr
    nobody = run("jobs", "--url", "http://127.0.0.1:9")
    assert nobody.exit_code == UNREACHABLE
    assert "tuner serve" in nobody.stderr


def test_tokens_are_shown_once_and_can_be_revoked(
    run: Run, database_url: str, settings: Settings
) -> None:
    place = ("--database-url", database_url)
    made = run("token", "create", "anna", "--scope", "read", "--days", "7", *place)
    secret = made.stdout.strip()
    assert "read until" in made.stderr
    services = Services.open(settings)
    try:
        caller = services.tokens.find(secret)
        assert caller is not None
        assert caller.scopes == {Scope.READ}
        [listed] = run("token", "list", "--json", *place).stdout.splitlines()
        assert secret not in listed
        token_id = json.loads(listed)["id"]
        assert "usable" in run("token", "list", *place).stdout
        run("token", "revoke", token_id, *place)
        assert services.tokens.find(secret) is None
        assert "revoked" in run("token", "list", *place).stdout
    finally:
        services.close()


def test_the_database_is_upgraded(run: Run, empty_url: str) -> None:
    place = ("--database-url", empty_url)
    before = run("db", "current", *place)
    assert (before.exit_code, before.stdout) == (1, "None (run `tuner db upgrade`)\n")
    assert "was None" in run("db", "upgrade", *place).stdout
    assert run("db", "current", *place).exit_code == 0
    assert "already" in run("db", "upgrade", *place).stdout


def test_postgresql_without_tables_is_refused(run: Run, empty_url: str) -> None:
    if empty_url.startswith("sqlite"):
        pytest.skip("SQLite is upgraded without being asked")
    for command in (["serve", "--port", "0"], ["worker"], ["token", "list"]):
        result = run(*command, "--database-url", empty_url)
        assert result.exit_code == BAD_INPUT
        assert "tuner db upgrade" in result.stderr


def test_a_missing_driver_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    result = run("db", "upgrade", "--database-url", "postgresql://nobody@127.0.0.1:9/nothing")
    assert result.exit_code == BAD_INPUT
    assert "install accutune[postgres]" in " ".join(result.stderr.split())


def test_what_may_not_be_served_is_refused(run: Run, services: Services, tmp_path: Path) -> None:
    port = os.environ["ACCUTUNE_URL"].rpartition(":")[2]
    place = ("--data-dir", str(tmp_path / "other"), "--no-worker")
    taken = run("serve", "--port", port, *place)
    assert (taken.exit_code, "is in use already" in taken.stderr) == (BAD_INPUT, True)
    exposed = run("serve", "--host", "0.0.0.0", "--port", "0", *place)
    assert (exposed.exit_code, "no usable token" in exposed.stderr) == (BAD_INPUT, True)


def running_worker(workers: Callable[[], list[WorkerInfo]], but: int = 0) -> psutil.Process:
    """Wait for a worker that runs, other than the one of this process id; return its process."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for worker in workers():
            if worker.state == "running" and worker.pid != but:
                return psutil.Process(worker.pid)
        time.sleep(0.1)
    raise AssertionError("no worker came")


def test_a_service_keeps_a_worker_and_takes_it_along(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("raise RuntimeError('not this one')")
    command = [str(Path(sys.executable).with_name("tuner")), "serve", "--port", "0"]
    with (
        (tmp_path / "log").open("w+") as log,
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("Dashboard: http://127.0.0.1:"), Path(log.name).read_text()
            check_service(process, said.split()[-1])
        finally:
            process.kill()


def check_service(process: subprocess.Popen[str], url: str) -> None:
    """Kill the worker, then end the service while a client follows a job."""
    with Client(url) as client:
        first = running_worker(client.workers)
        first.kill()
        second = running_worker(client.workers, but=first.pid)
        job = client.submit("digits-resnet", {"epochs": 1})
        events = f"{url}/v1/jobs/{job.id}/events"
        with httpx.stream("GET", events, timeout=60) as response:
            lines = response.iter_lines()
            assert "event: state" in lines
            process.send_signal(signal.SIGINT)
            assert "event: error" not in lines  # to its end: the service closes it
    assert process.wait(120) == 0
    assert not second.is_running()


def test_a_worker_ends_with_its_service_however_that_ended(settings: Settings) -> None:
    services = Services.open(settings)
    command = [sys.executable, "-P", "-m", "server.own_worker"]
    environ = os.environ | settings.environ()
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environ) as process:
        try:
            running_worker(lambda: listed(services.database, settings.lease_s, 10))
            assert process.stdin is not None
            process.stdin.close()  # as the system does when its owner is killed
            assert process.wait(60) == 0
            assert [w.state for w in listed(services.database, settings.lease_s, 10)] == ["ended"]
        finally:
            process.kill()
            services.close()
