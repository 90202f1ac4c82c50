"""The client that waits for its answers."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from server.client import calls
from server.client.address import Address, new_key, submission
from server.client.calls import Call
from server.client.download import Download
from server.client.errors import ApiError, UnavailableError, UnreachableError, api_error
from server.client.stream import JobEvent, Stream
from server.client.waiting import Display, Waiting, has_ended
from server.schemas import Artifact, Asset, Job, Page, RecipeInfo, Trial, WorkerInfo
from tuner.config import TuningConfig

Answer = TypeVar("Answer")
Item = TypeVar("Item")

_CHUNK_BYTES = 1 << 18


class Client:
    """The service's API; `with Client() as client:` closes its connections.

    `url` and `token` default to ACCUTUNE_URL (else http://127.0.0.1:8765) and ACCUTUNE_TOKEN.
    Requests that can be repeated without harm are tried `retries` times more when the connection
    breaks or the service is busy. Everything raises a ClientError: an ApiError where the service
    refused, an UnreachableError where it gave no answer.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 6,
    ) -> None:
        self._address = Address(url, token, timeout_s, retries)
        self._http = httpx.Client(**self._address.options())

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(
        self,
        recipe: str,
        params: Mapping[str, Any] | None = None,
        config: TuningConfig | Mapping[str, Any] | None = None,
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        max_attempts: int = 3,
        timeout_s: float | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Queue a job. It is queued once, however often the request has to be sent.

        `idempotency_key` makes that true for several calls, too: the same key and the same job
        give what the first call queued.
        """
        body = submission(
            recipe,
            params,
            config,
            priority=priority,
            labels=dict(labels or {}),
            max_attempts=max_attempts,
            timeout_s=timeout_s,
        )
        return self._send(calls.submit(body, idempotency_key or new_key()))

    def job(self, job_id: str) -> Job:
        """Return a job as it is now."""
        return self._send(calls.job(job_id))

    def jobs(self, **filters: Any) -> Iterator[Job]:
        """Yield jobs, the newest first; filters: `state`, `recipe`, `owner`, `label` (name:value).

        `state` may be a list.
        """
        return self._items(calls.jobs(**filters))

    def trials(self, job_id: str) -> Iterator[Trial]:
        """Yield the trials of a job by number, from 1 on."""
        return self._items(calls.trials(job_id))

    def trial(self, job_id: str, number: int) -> Trial:
        """Return one trial of a job; number 0 is the FP32 baseline."""
        return self._send(calls.trial(job_id, number))

    def events(self, job_id: str, after: int | None = None) -> Iterator[JobEvent]:
        """Yield what happened to a job after this event, and what happens, until the job ends.

        A lost connection is made again; no event is missed, none comes twice.
        """
        stream = Stream(job_id, after)
        attempts = self._address.attempts(stream.call)
        while not stream.is_over:
            try:
                with self._opened(stream.call, self._address.stream_timeout()) as response:
                    stream.begin(response)
                    for chunk in response.iter_bytes():
                        for event in stream.feed(chunk):
                            attempts = self._address.attempts(stream.call)
                            yield event
                if not stream.is_over:
                    time.sleep(stream.retry_s)
            except (httpx.TransportError, ApiError) as error:
                time.sleep(attempts.pause_s(error))

    def wait(
        self, job_id: str, timeout_s: float | None = None, progress: bool | None = None
    ) -> Job:
        """Return the job when it has ended, well or not; raises WaitTimeoutError.

        `progress` None shows a bar on a terminal only; True shows it in any case.
        """
        waiting = Waiting(job_id, timeout_s)
        with Display(progress) as display:
            while True:
                try:
                    job = waiting.take(self._send(waiting.call))
                    display.show(job)
                    if has_ended(job):
                        return job
                except (UnreachableError, UnavailableError) as error:
                    waiting.forgive(error)
                time.sleep(waiting.pause_s())

    def cancel(self, job_id: str) -> Job:
        """Ask to end a job; it may take a moment until it is `cancelled`."""
        return self._send(calls.ask(job_id, "cancel"))

    def pause(self, job_id: str) -> Job:
        """Ask to pause a job after the trial that runs."""
        return self._send(calls.ask(job_id, "pause"))

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on from its stored trials."""
        return self._send(calls.ask(job_id, "resume"))

    def artifacts(self, job_id: str) -> list[Artifact]:
        """Return which files a job left."""
        return list(self._items(calls.artifacts(job_id)))

    def download(self, job_id: str, directory: str | Path) -> list[Path]:
        """Fetch the files of a job into a directory, and return where they lie.

        What is there already and unchanged is not fetched again; what was broken off goes on where
        it stood.
        """
        return [
            self._download(Download(artifact, Path(directory)))
            for artifact in self.artifacts(job_id)
        ]

    def recipes(self) -> list[RecipeInfo]:
        """Return what jobs can be made of, with the JSON schemas of the parameters."""
        return list(self._items(calls.recipes()))

    def workers(self) -> list[WorkerInfo]:
        """Return the workers, those that started last first."""
        return list(self._items(calls.workers()))

    def upload(self, path: str | Path, kind: str | None = None) -> Asset:
        """Send a safetensors or npz file; the id of the asset is what a recipe's parameters name.

        `kind` is told from the name of the file where it is not given.
        """
        return self._send(calls.upload(Path(path), kind))

    def _items(self, call: Call[Page[Item]]) -> Iterator[Item]:
        page = self._send(call)
        yield from page.items
        while page.next_cursor is not None:
            page = self._send(calls.following(call, page.next_cursor))
            yield from page.items

    def _download(self, download: Download) -> Path:
        if download.is_done():
            return download.target
        attempts = self._address.attempts(download.call)
        while not download.is_whole:
            try:
                with self._opened(download.call) as response:
                    download.begin(response)
                    for chunk in response.iter_bytes():
                        download.write(chunk)
                        attempts = self._address.attempts(download.call)
                download.end()
            except (httpx.TransportError, ApiError) as error:
                time.sleep(attempts.pause_s(error))
        return download.finish()

    def _send(self, call: Call[Answer]) -> Answer:
        attempts = self._address.attempts(call)
        while True:
            try:
                with self._opened(call) as response:
                    response.read()
                    return call.read(response)
            except (httpx.TransportError, ApiError) as error:
                time.sleep(attempts.pause_s(error))

    @contextmanager
    def _opened(
        self, call: Call[Any], timeout: httpx.Timeout | None = None
    ) -> Iterator[httpx.Response]:
        """Give the answer with its body unread; raises ApiError where it is an error."""
        arguments = self._address.request(call)
        if timeout is not None:
            arguments["timeout"] = timeout
        if call.file is not None:
            arguments["content"] = _chunks(call.file)
        with self._http.stream(**arguments) as response:
            if response.is_error:
                response.read()
                raise api_error(response)
            yield response


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
