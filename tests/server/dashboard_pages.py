"""What the tests of the dashboard share: jobs in every state, and a parser of pages."""

from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from fastapi.testclient import TestClient

from server.jobs import Jobs
from server.states import Move, State
from tests.server.helpers import claimed, record, store, submission, succeeded

EVIL = "<script>alert('x')</script>&\"'"
_VOID = {"meta", "link", "input", "br", "line", "path", "circle", "rect", "img"}


@dataclass
class Element:
    """An element with its attributes, and the text in it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """A page as a browser reads it; tags must nest."""

    html: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[Element] = []
        self._pieces: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == [], self._open

    def __hash__(self) -> int:
        return id(self)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data
        if any(element.attributes.get("id") == "content" for element in self._open):
            self._pieces.append(data)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Return the elements of this tag that have these attributes."""
        wanted = attributes.items()
        return [
            e
            for e in self.elements
            if e.tag == tag and all(e.attributes.get(k) == v for k, v in wanted)
        ]

    def by_id(self, element_id: str) -> Element:
        """Return the element of this id."""
        (found,) = [e for e in self.elements if e.attributes.get("id") == element_id]
        return found

    @property
    def words(self) -> str:
        """The text of its content: words, and a space between elements."""
        return " ".join(" ".join(self._pieces).split())

    @property
    def form(self) -> dict[str, str]:
        """What a browser would send of the form of a submission, untouched."""
        values = {}
        for e in self.elements:
            name = e.attributes.get("name")
            if name is None or e.tag not in ("input", "textarea", "select"):
                continue
            if e.attributes.get("type") == "checkbox" and "checked" not in e.attributes:
                continue
            text = e.text.removeprefix("\n") if e.tag == "textarea" else None
            values[name] = e.attributes.get("value", "") if text is None else text
        select = ""
        for e in self.elements:
            if e.tag == "select":
                select = e.attributes["name"]
                values[select] = ""
                first = True
            elif e.tag == "option" and (first or "selected" in e.attributes):
                values[select] = e.attributes.get("value", e.text)
                first = False
        return values


def in_state(jobs: Jobs, url: str, state: State, **fields: Any) -> str:
    """Return the id of a job in this state; it has trials where it ever ran."""
    return _MAKERS[state](jobs, url, fields)


def _queued(jobs: Jobs, url: str, fields: dict[str, Any]) -> str:
    return jobs.submit(submission(**fields), "local")[0].id


def _running(jobs: Jobs, url: str, fields: dict[str, Any]) -> str:
    _queued(jobs, url, fields)
    claim = claimed(jobs)
    store(jobs, claim, url, [record(number) for number in range(3)])
    return claim.job_id


def _asked(*moves: Move) -> Callable[[Jobs, str, dict[str, Any]], str]:
    def make(jobs: Jobs, url: str, fields: dict[str, Any]) -> str:
        job_id = _running(jobs, url, fields)
        for move in moves:
            jobs.ask(job_id, move)
        return job_id

    return make


def _at_rest(move: Move) -> Callable[[Jobs, str, dict[str, Any]], str]:
    def make(jobs: Jobs, url: str, fields: dict[str, Any]) -> str:
        job_id = _queued(jobs, url, fields)
        jobs.ask(job_id, move)
        return job_id

    return make


def _failed(jobs: Jobs, url: str, fields: dict[str, Any]) -> str:
    _queued(jobs, url, fields)
    claim = claimed(jobs)
    store(jobs, claim, url, [record(number) for number in range(2)])
    jobs.fail(claim, f'Traceback (most recent call last):\n  File "x.py"\nValueError: {EVIL}')
    return claim.job_id


def _succeeded(jobs: Jobs, url: str, fields: dict[str, Any]) -> str:
    return succeeded(jobs, url)


_MAKERS: dict[State, Callable[[Jobs, str, dict[str, Any]], str]] = {
    State.QUEUED: _queued,
    State.RUNNING: _running,
    State.PAUSING: _asked(Move.PAUSE),
    State.CANCELLING: _asked(Move.CANCEL),
    State.PAUSED: _at_rest(Move.PAUSE),
    State.CANCELLED: _at_rest(Move.CANCEL),
    State.FAILED: _failed,
    State.SUCCEEDED: _succeeded,
}


def page(client: TestClient, path: str, status: int = 200) -> Page:
    """Load a page as a browser would, and check what must hold for all of them."""
    answer = client.get(path, headers={"Accept": "text/html"}, follow_redirects=False)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    found = Page(answer.text)
    for element in found.elements:
        assert "style" not in element.attributes
        assert not [name for name in element.attributes if name.startswith("on")]
    assert found.all("style") == []
    scripts = found.all("script")
    assert scripts
    assert all(s.attributes["src"].startswith("/static/") and not s.text.strip() for s in scripts)
    ids = [e.attributes["id"] for e in found.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    return found
