"""Reading server-sent events from bytes."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.client import ForeignAnswerError, JobEvent
from server.client.stream import Decoder

# U+2028, U+0085 and the like end lines for str.splitlines, but not here
_TEXT = "a\u2028b\x85c\x0bd — ü"
_EVENTS = [
    JobEvent(1, "state", {"state": "queued"}),
    JobEvent(7, "trial", {"number": 1, "reason": _TEXT}),
    JobEvent(9, "state", {"state": "succeeded"}),
]


def _stream(end: str) -> bytes:
    lines = ["retry: 1500", ""]
    for event in _EVENTS:
        data = json.dumps(event.data, ensure_ascii=False)
        lines += [": a comment", f"id: {event.id}", f"event:{event.kind}", f"data: {data}", ""]
    return (end.join(lines) + end + end).encode()


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 400), max_size=8))
def test_events_are_read_however_the_bytes_are_cut(end: str, cuts: list[int]) -> None:
    decoder, stream = Decoder(), _stream(end)
    edges = [0, *sorted(cuts), len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(edges)]
    # what ends with CR is complete only when the next byte is known
    found = [event for chunk in [*chunks, b":"] for event in decoder.feed(chunk)]
    assert found == _EVENTS
    assert decoder.retry_s == 1.5


def test_several_lines_of_data_are_one_text() -> None:
    event = b'id: 3\nevent: error\ndata: {"error":\ndata: "x"}\n\n'
    assert list(Decoder().feed(event)) == [JobEvent(3, "error", {"error": "x"})]


@pytest.mark.parametrize("event", [b"data: {}\n\n", b"id: 1\ndata: no JSON\n\n"])
def test_what_is_no_event_of_the_service_is_an_error(event: bytes) -> None:
    with pytest.raises(ForeignAnswerError, match="cannot be read"):
        list(Decoder().feed(event))
