"""Server-sent events: reading them from bytes, and going on where a stream broke off."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import httpx

from server.client.calls import Call, job_path
from server.client.errors import ForeignAnswerError
from server.schemas import EventKind
from server.states import ENDED

_LINE_END = re.compile(rb"\r\n|\n|\r")
_MEDIA_TYPE = "text/event-stream"


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; ids grow."""

    id: int
    kind: EventKind
    data: dict[str, Any]


class Decoder:
    """Reads the events of one stream (WHATWG HTML, section 9.2.6), however its bytes are cut.

    Lines end with CR, LF or both and with nothing else, unlike those of `str.splitlines`.
    """

    def __init__(self) -> None:
        self.retry_s: float | None = None
        self._rest = b""
        self._id = ""
        self._kind = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[JobEvent]:
        """Yield the events that these bytes complete."""
        text = self._rest + chunk
        *lines, self._rest = _LINE_END.split(text)
        if text.endswith(b"\r"):  # an LF may follow
            self._rest = lines.pop() + b"\r"
        for line in lines:
            event = self._line(line.decode())
            if event is not None:
                yield event

    def _line(self, line: str) -> JobEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id":
            self._id = value
        elif name == "retry" and value.isdigit():
            self.retry_s = int(value) / 1000
        return None

    def _dispatch(self) -> JobEvent | None:
        kind, data = self._kind, "\n".join(self._data)
        self._kind, self._data = "", []
        if not data:
            return None
        try:
            return JobEvent(int(self._id), cast(EventKind, kind), json.loads(data))
        except ValueError as error:
            raise ForeignAnswerError(f"event {self._id!r} cannot be read: {error}") from error


class Stream:
    """The events of a job over as many connections as it takes, none of them twice."""

    def __init__(self, job_id: str, after: int | None = None) -> None:
        self._path = f"{job_path(job_id)}/events"
        self._last = after
        self._decoder = Decoder()
        self.retry_s = 1.0
        self.is_over = False

    @property
    def call(self) -> Call[None]:
        """The request that goes on after the last event."""
        headers = {"Accept": _MEDIA_TYPE, "Cache-Control": "no-store"}
        if self._last is not None:
            headers["Last-Event-ID"] = str(self._last)
        return Call("GET", self._path, lambda response: None, headers=headers)

    def begin(self, response: httpx.Response) -> None:
        """Take note of a new connection; no content means that nothing follows any more."""
        self._decoder = Decoder()
        self.is_over = response.status_code == httpx.codes.NO_CONTENT
        media_type = response.headers.get("Content-Type", "")
        if not self.is_over and not media_type.startswith(_MEDIA_TYPE):
            raise ForeignAnswerError(f"{response.url} answered {media_type!r}, no events")

    def feed(self, chunk: bytes) -> Iterator[JobEvent]:
        """Yield the events that these bytes complete."""
        for event in self._decoder.feed(chunk):
            self._last = event.id
            self.is_over = event.kind == "state" and event.data.get("state") in ENDED
            yield event
        self.retry_s = self._decoder.retry_s or self.retry_s
