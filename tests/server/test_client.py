"""Both clients against a real service, over wires that hold and wires that break."""

import hashlib
import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from server.auth import Scope
from server.client import (
    AddressError,
    ApiError,
    Client,
    ConflictError,
    DownloadError,
    ForbiddenError,
    ForeignAnswerError,
    InvalidError,
    NotFoundError,
    UnauthorizedError,
    UnreachableError,
    WaitTimeoutError,
)
from server.jobs import Jobs
from server.services import Services
from server.settings import Settings
from server.states import Move
from tests.server.access import on_sqlite, with_changes
from tests.server.clients import connected
from tests.server.helpers import BODY, claimed, record, store, submission, succeeded
from tests.server.live import Cut, Proxy, service
from tuner.config import TuningConfig

KINDS = ("sync", "async")
WEIGHTS = bytes(range(256)) * 4096


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((100, 100)))
    return buffer.getvalue()


NPZ = _npz()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which client."""
    return str(request.param)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings on SQLite."""
    return on_sqlite(tmp_path / "data")


@pytest.fixture
def live(settings: Settings) -> Iterator[tuple[str, Services]]:
    """A service that listens."""
    with service(settings) as (url, app):
        yield url, app.state.services


@pytest.fixture
def jobs(live: tuple[str, Services]) -> Jobs:
    """Its queue."""
    return live[1].jobs


@pytest.fixture
def client(kind: str, live: tuple[str, Services]) -> Iterator[Client]:
    """A client of it."""
    with connected(kind, live[0]) as client:
        yield client


@contextmanager
def proxied(live: tuple[str, Services], *cuts: Cut | None) -> Iterator[Proxy]:
    """Cut the first connections like this, and no others."""
    port = int(live[0].rpartition(":")[2])
    proxy = Proxy(port, lambda number: cuts[number] if number < len(cuts) else None)
    with proxy.running():
        yield proxy


def with_artifact(live: tuple[str, Services], content: bytes = WEIGHTS) -> str:
    """Run a job to its end that leaves a file of this content; return its id."""
    services = live[1]
    artifact = {
        "name": "weights.safetensors",
        "media_type": "application/octet-stream",
        "size_bytes": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    }
    job_id = succeeded(services.jobs, services.settings.database, artifacts=[artifact])
    folder = services.settings.artifacts_dir / job_id
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(content)
    return job_id


def test_a_job_from_its_submission_to_its_end(client: Client, live: tuple[str, Services]) -> None:
    config = TuningConfig(space="mixed-int", max_trials=7)
    job = client.submit("digits-resnet", {"epochs": 1}, config, 5, {"team": "vision"})
    assert (job.state, job.config, job.priority) == ("queued", config, 5)
    assert client.pause(job.id).state == "paused"
    assert client.resume(job.id).state == "queued"
    claim = claimed(live[1].jobs)
    store(live[1].jobs, claim, live[1].settings.database, [record(n) for n in range(3)])
    assert [trial.number for trial in client.trials(job.id)] == [1, 2]
    assert client.trial(job.id, 0).reason == "trial 0"
    assert client.cancel(job.id).state == "cancelling"
    live[1].jobs.release(claim)
    assert client.job(job.id).state == "cancelled"
    assert client.artifacts(job.id) == []
    assert client.workers() == []
    assert "digits-resnet" in [recipe.name for recipe in client.recipes()]


def test_all_pages_are_read(client: Client, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.client.calls._PAGE", 2)
    ids = [jobs.submit(submission(), "local")[0].id for _ in range(5)]
    jobs.ask(ids[3], Move.CANCEL)
    assert [job.id for job in client.jobs()] == ids[::-1]
    assert [job.id for job in client.jobs(state=["cancelled", "failed"])] == [ids[3]]
    assert list(client.jobs(label="team:vision")) == []


def test_a_job_whose_answer_was_lost_is_submitted_once(
    kind: str, live: tuple[str, Services]
) -> None:
    lost = [Cut(), Cut(after_bytes=20), Cut(request=False)]
    with proxied(live, *lost) as proxy, connected(kind, proxy.url) as client:
        job = client.submit(**BODY)
    assert [row.id for row in live[1].jobs.page(10)] == [job.id]
    assert len(proxy.requests) == 3


def test_what_may_not_be_repeated_is_not(kind: str, live: tuple[str, Services]) -> None:
    job_id = live[1].jobs.submit(submission(), "local")[0].id
    with proxied(live, Cut()) as proxy, connected(kind, proxy.url) as client:
        with pytest.raises(UnreachableError, match="took effect is not known"):
            client.pause(job_id)
        assert len(proxy.requests) == 1
        assert client.job(job_id).state == "paused"


def test_the_same_key_submits_once(client: Client, jobs: Jobs) -> None:
    first = client.submit(**BODY, idempotency_key="one")
    assert client.submit(**BODY, idempotency_key="one").id == first.id
    with pytest.raises(InvalidError, match="came before with another body"):
        client.submit("char-lm", idempotency_key="one")


@pytest.mark.parametrize("cuts", [[], [Cut(900), Cut(), Cut(700), Cut(request=False), Cut(950)]])
def test_every_event_comes_once(kind: str, live: tuple[str, Services], cuts: list[Cut]) -> None:
    jobs, url = live[1].jobs, live[1].settings.database
    job_id = jobs.submit(submission(), "local")[0].id
    claim = claimed(jobs)
    store(jobs, claim, url, [record(n) for n in range(4)])

    def go_on() -> None:
        time.sleep(0.3)
        store(jobs, claim, url, [record(n) for n in range(4, 8)])
        jobs.fail(claim, "an error\u2028of two lines")

    late = threading.Thread(target=go_on)
    late.start()
    with proxied(live, *cuts) as proxy, connected(kind, proxy.url) as client:
        events = list(client.events(job_id))
        late.join()
        stored = jobs.events(job_id)
        assert [(event.id, event.kind) for event in events] == [(r.id, r.kind) for r in stored]
        assert [event.data for event in events] == [row.data for row in stored]
        assert len(proxy.requests) == 1 + sum(cut.request for cut in cuts)
        assert [e.id for e in client.events(job_id, after=stored[3].id)] == [
            row.id for row in stored[4:]
        ]
        assert list(client.events(job_id, after=stored[-1].id)) == []


def test_a_download_goes_on_where_it_broke_off(
    kind: str, live: tuple[str, Services], tmp_path: Path
) -> None:
    job_id = with_artifact(live)
    with proxied(live, None, Cut(400_000), Cut(100), Cut(400_000)) as proxy:
        with connected(kind, proxy.url) as client:
            [path] = client.download(job_id, tmp_path / "out")
            assert path.read_bytes() == WEIGHTS
            assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]
            assert sum(b"range: bytes=" in request.lower() for request in proxy.requests) == 3
            assert client.download(job_id, tmp_path / "out") == [path]
        assert len(proxy.requests) == 1 + 4 + 1


def test_a_damaged_file_is_not_kept(
    client: Client, live: tuple[str, Services], tmp_path: Path
) -> None:
    job_id = with_artifact(live, content=WEIGHTS[:-1] + b"x")
    with pytest.raises(DownloadError, match="arrived damaged"):
        client.download(job_id, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "sha256"),
    [(name, "0" * 64) for name in ("../x", "/x", "..", ".", "a\\b", "")] + [("x", "../" * 16)],
)
def test_a_service_does_not_choose_the_folder(tmp_path: Path, name: str, sha256: str) -> None:
    artifact = {"name": name, "media_type": "x", "size_bytes": 0, "sha256": sha256}
    artifact |= {"created_at": "2026-01-01T00:00:00Z", "href": "/x"}
    page = json.dumps({"items": [artifact], "next_cursor": None}).encode()
    with (
        answering(page) as url,
        Client(url) as client,
        pytest.raises(DownloadError, match="no file name, or no SHA-256"),
    ):
        client.download("job", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_with_the_job(client: Client, live: tuple[str, Services]) -> None:
    jobs = live[1].jobs
    job_id = jobs.submit(submission(), "local")[0].id
    with pytest.raises(WaitTimeoutError, match="its state is queued"):
        client.wait(job_id, timeout_s=0.2)
    threading.Timer(0.3, lambda: jobs.fail(claimed(jobs), "no luck")).start()
    job = client.wait(job_id, timeout_s=30)
    assert (job.state, job.error) == ("failed", "no luck")


def test_waiting_outlives_a_restart_of_the_service(kind: str, live: tuple[str, Services]) -> None:
    job_id = live[1].jobs.submit(submission(), "local")[0].id
    threading.Timer(0.5, lambda: live[1].jobs.ask(job_id, Move.CANCEL)).start()
    gone = [Cut(request=False)] * 3
    with proxied(live, None, *gone) as proxy, connected(kind, proxy.url, retries=0) as client:
        assert client.wait(job_id, timeout_s=30).state == "cancelled"


def test_progress_is_lines_where_there_is_no_terminal(
    client: Client, live: tuple[str, Services], capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = succeeded(live[1].jobs, live[1].settings.database)
    client.wait(job_id, progress=True)
    client.wait(job_id)
    text = "succeeded: 3 of at most 50 trials  best: 0.9, 244 KiB\n"
    assert capsys.readouterr().err == text


def test_refusals_say_what_to_do(kind: str, settings: Settings) -> None:
    with service(with_changes(settings, auth=True)) as (url, app):
        tokens = app.state.services.tokens
        with connected(kind, url) as client, pytest.raises(UnauthorizedError, match="TOKEN"):
            client.job("0" * 26)
        _, reader = tokens.create("anna", [Scope.READ])
        no_scope = pytest.raises(ForbiddenError, match="token create NAME --scope submit")
        with connected(kind, url, token=reader) as client, no_scope:
            client.submit(**BODY)
        _, secret = tokens.create("anna", [Scope.SUBMIT])
        with connected(kind, url, token=secret) as client:
            assert client.submit(**BODY).owner == "anna"


def test_errors_have_the_fields_of_the_problem_document(client: Client, jobs: Jobs) -> None:
    with pytest.raises(InvalidError, match="/params/epochs: ") as caught:
        client.submit("digits-resnet", {"epochs": -1})
    error = caught.value
    assert (error.status, error.title) == (422, "Invalid")
    assert error.type.endswith("invalid")
    assert [one["pointer"] for one in error.errors] == ["/params/epochs"]
    with pytest.raises(NotFoundError, match="no job"):
        client.job("0" * 26)
    job = client.submit(**BODY)
    client.cancel(job.id)
    with pytest.raises(ConflictError, match="cancelled cannot resume"):
        client.resume(job.id)


def test_what_is_wrong_from_the_start_is_not_sent() -> None:
    with Client("http://127.0.0.1:9", retries=0) as client:
        with pytest.raises(ValidationError, match="max_trials"):
            client.submit("digits-resnet", config={"max_trials": -1})
        with pytest.raises(
            UnreachableError, match=r"nothing answers at http://127\.0\.0\.1:9: start"
        ):
            client.submit("digits-resnet")
    for url in ("localhost:8765", "ftp://there", "http://"):
        with pytest.raises(AddressError, match="give http://host:port"):
            Client(url)
    with pytest.raises(AddressError, match="without line breaks"):
        Client(token="acc_x\n")


def test_too_many_requests_come_later(kind: str, settings: Settings) -> None:
    few = with_changes(settings, requests_per_minute=60)
    with service(few) as (url, app), connected(kind, url) as client:
        job_id = app.state.services.jobs.submit(submission(), "local")[0].id
        begin = time.monotonic()
        for _ in range(62):
            client.job(job_id)
        assert time.monotonic() - begin > 1


def test_the_environment_says_where_and_who(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(with_changes(settings, auth=True)) as (url, app):
        _, secret = app.state.services.tokens.create("anna", [Scope.SUBMIT])
        monkeypatch.setenv("ACCUTUNE_URL", url)
        monkeypatch.setenv("ACCUTUNE_TOKEN", secret)
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not for this machine
        with Client() as client:
            assert list(client.jobs()) == []
            assert secret not in repr(client)


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    """Run a server that answers everything with the same; give its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_another_server_at_the_address_is_named() -> None:
    with answering(b"<html>hello</html>") as url, Client(url) as client:
        with pytest.raises(ForeignAnswerError, match="is it this service"):
            client.job("x")
        with pytest.raises(ForeignAnswerError, match="no events"):
            list(client.events("x"))
    told = pytest.raises(ApiError, match=r"<html>proxy</html> \(404 Not Found\)")
    with answering(b"<html>proxy</html>", 404) as url, Client(url) as client, told:
        client.job("x")


def test_an_upload_is_streamed_and_repeated(
    kind: str, live: tuple[str, Services], tmp_path: Path
) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(NPZ)
    with proxied(live, Cut()) as proxy, connected(kind, proxy.url) as client:
        asset = client.upload(path)
    assert (asset.kind, asset.name, asset.size_bytes) == ("npz", "x.npz", len(NPZ))
    assert asset.id == hashlib.sha256(NPZ).hexdigest()
