"""The client for asyncio and trio."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import anyio
import httpx
from anyio import to_thread

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


class AsyncClient:
    """The service's API, as `Client` has it; `async with AsyncClient() as client:` closes it."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 6,
    ) -> None:
        self._address = Address(url, token, timeout_s, retries)
        self._http = httpx.AsyncClient(**self._address.options())

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(
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
        return await self._send(calls.submit(body, idempotency_key or new_key()))

    async def job(self, job_id: str) -> Job:
        """Return a job as it is now."""
        return await self._send(calls.job(job_id))

    def jobs(self, **filters: Any) -> AsyncIterator[Job]:
        """Yield jobs, the newest first; filters: `state`, `recipe`, `owner`, `label` (name:value).

        `state` may be a list.
        """
        return self._items(calls.jobs(**filters))

    def trials(self, job_id: str) -> AsyncIterator[Trial]:
        """Yield the trials of a job by number, from 1 on."""
        return self._items(calls.trials(job_id))

    async def trial(self, job_id: str, number: int) -> Trial:
        """Return one trial of a job; number 0 is the FP32 baseline."""
        return await self._send(calls.trial(job_id, number))

    async def events(self, job_id: str, after: int | None = None) -> AsyncIterator[JobEvent]:
        """Yield what happened to a job after this event, and what happens, until the job ends.

        A lost connection is made again; no event is missed, none comes twice.
        """
        stream = Stream(job_id, after)
        attempts = self._address.attempts(stream.call)
        while not stream.is_over:
            try:
                async with self._opened(stream.call, self._address.stream_timeout()) as response:
                    stream.begin(response)
                    async for chunk in response.aiter_bytes():
                        for event in stream.feed(chunk):
                            attempts = self._address.attempts(stream.call)
                            yield event
                if not stream.is_over:
                    await anyio.sleep(stream.retry_s)
            except (httpx.TransportError, ApiError) as error:
                await anyio.sleep(attempts.pause_s(error))

    async def wait(
        self, job_id: str, timeout_s: float | None = None, progress: bool | None = None
    ) -> Job:
        """Return the job when it has ended, well or not; raises WaitTimeoutError.

        `progress` None shows a bar on a terminal only; True shows it in any case.
        """
        waiting = Waiting(job_id, timeout_s)
        with Display(progress) as display:
            while True:
                try:
                    job = waiting.take(await self._send(waiting.call))
                    display.show(job)
                    if has_ended(job):
                        return job
                except (UnreachableError, UnavailableError) as error:
                    waiting.forgive(error)
                await anyio.sleep(waiting.pause_s())

    async def cancel(self, job_id: str) -> Job:
        """Ask to end a job; it may take a moment until it is `cancelled`."""
        return await self._send(calls.ask(job_id, "cancel"))

    async def pause(self, job_id: str) -> Job:
        """Ask to pause a job after the trial that runs."""
        return await self._send(calls.ask(job_id, "pause"))

    async def resume(self, job_id: str) -> Job:
        """Let a paused job go on from its stored trials."""
        return await self._send(calls.ask(job_id, "resume"))

    async def artifacts(self, job_id: str) -> list[Artifact]:
        """Return which files a job left."""
        return await self._list(self._items(calls.artifacts(job_id)))

    async def download(self, job_id: str, directory: str | Path) -> list[Path]:
        """Fetch the files of a job into a directory, and return where they lie.

        What is there already and unchanged is not fetched again; what was broken off goes on where
        it stood.
        """
        return [
            await self._download(Download(artifact, Path(directory)))
            for artifact in await self.artifacts(job_id)
        ]

    async def recipes(self) -> list[RecipeInfo]:
        """Return what jobs can be made of, with the JSON schemas of the parameters."""
        return await self._list(self._items(calls.recipes()))

    async def workers(self) -> list[WorkerInfo]:
        """Return the workers, those that started last first."""
        return await self._list(self._items(calls.workers()))

    async def upload(self, path: str | Path, kind: str | None = None) -> Asset:
        """Send a safetensors or npz file; the id of the asset is what a recipe's parameters name.

        `kind` is told from the name of the file where it is not given.
        """
        return await self._send(calls.upload(Path(path), kind))

    async def _items(self, call: Call[Page[Item]]) -> AsyncIterator[Item]:
        page = await self._send(call)
        while True:
            for item in page.items:
                yield item
            if page.next_cursor is None:
                return
            page = await self._send(calls.following(call, page.next_cursor))

    async def _list(self, items: AsyncIterator[Item]) -> list[Item]:
        return [item async for item in items]

    async def _download(self, download: Download) -> Path:
        if await to_thread.run_sync(download.is_done):
            return download.target
        attempts = self._address.attempts(download.call)
        while not download.is_whole:
            try:
                async with self._opened(download.call) as response:
                    download.begin(response)
                    async for chunk in response.aiter_bytes():
                        download.write(chunk)
                        attempts = self._address.attempts(download.call)
                download.end()
            except (httpx.TransportError, ApiError) as error:
                await anyio.sleep(attempts.pause_s(error))
        return await to_thread.run_sync(download.finish)

    async def _send(self, call: Call[Answer]) -> Answer:
        attempts = self._address.attempts(call)
        while True:
            try:
                async with self._opened(call) as response:
                    await response.aread()
                    return call.read(response)
            except (httpx.TransportError, ApiError) as error:
                await anyio.sleep(attempts.pause_s(error))

    @asynccontextmanager
    async def _opened(
        self, call: Call[Any], timeout: httpx.Timeout | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Give the answer with its body unread; raises ApiError where it is an error."""
        arguments = self._address.request(call)
        if timeout is not None:
            arguments["timeout"] = timeout
        if call.file is not None:
            arguments["content"] = _chunks(call.file)
        async with self._http.stream(**arguments) as response:
            if response.is_error:
                await response.aread()
                raise api_error(response)
            yield response


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        while chunk := await file.read(_CHUNK_BYTES):
            yield chunk
