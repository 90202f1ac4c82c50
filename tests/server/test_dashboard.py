"""The dashboard without a browser: every page, what it escapes, filters, pages and forms."""

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.auth import Scope
from server.dashboard.pages import STATIC
from server.dashboard.routes import jobs as list_routes
from server.errors import DatabaseError
from server.jobs import Jobs
from server.states import State
from tests.server.access import bearer, guarded
from tests.server.dashboard_pages import EVIL, Page, in_state, page
from tests.server.helpers import HEADER, claimed, record, store, submission, succeeded
from tuner.report.page import SHADES
from tuner.storage import StudyStore

ROOT = Path(__file__).parents[2]
ACTIONS = {
    State.QUEUED: {"pause", "cancel"},
    State.RUNNING: {"pause", "cancel"},
    State.PAUSING: {"resume", "cancel"},
    State.PAUSED: {"resume", "cancel"},
    State.CANCELLING: set(),
    State.CANCELLED: set(),
    State.SUCCEEDED: set(),
    State.FAILED: set(),
}


def test_what_pages_load_is_there(client: TestClient) -> None:
    found = page(client, "/")
    links = [e.attributes["href"] for e in found.all("link")]
    for path in links + [e.attributes["src"] for e in found.all("script")]:
        assert client.get(path).status_code == 200


def test_the_list_is_empty_at_first(client: TestClient) -> None:
    found = page(client, "/")
    assert "No jobs yet" in found.words
    assert found.all("a", href="/submit")


def test_a_job_in_every_state(client: TestClient, jobs: Jobs, database_url: str) -> None:
    for state in reversed(State):  # a queued one would be claimed by those after it
        job_id = in_state(jobs, database_url, state)
        assert jobs.get(job_id).state == state
        found = page(client, f"/jobs/{job_id}")
        assert state in found.words
        expected = {f"/jobs/{job_id}/{move}" for move in ACTIONS[state]}
        assert {e.attributes["action"] for e in found.all("form", method="post")} == expected
        listed = {e.attributes["action"] for e in page(client, "/").all("form", method="post")}
        assert {action for action in listed if job_id in action} == expected
        is_live = "data-live" in found.by_id("content").attributes
        assert is_live == (state not in ("succeeded", "failed", "cancelled"))
        assert ("data-ended" in client.get(f"/jobs/{job_id}/live").text) == (not is_live)
        page(client, f"/compare?a={job_id}&b={job_id}")


def test_a_job_that_failed_shows_why(client: TestClient, jobs: Jobs, database_url: str) -> None:
    job_id = in_state(jobs, database_url, State.FAILED)
    found = page(client, f"/jobs/{job_id}")
    assert f"ValueError: {EVIL}" in found.words
    assert "Traceback" in found.by_id("traceback").text


def test_a_job_that_succeeded_shows_all(client: TestClient, jobs: Jobs, database_url: str) -> None:
    files = {"name": "plan.json", "media_type": "application/json", "size_bytes": 2048}
    job_id = succeeded(jobs, database_url, artifacts=[{**files, "sha256": "ab" * 32}])
    found = page(client, f"/jobs/{job_id}")
    assert "goal ≥ 0.891" in found.by_id("scatter").text
    assert len(found.all("a", tabindex="-1")) == 4  # FP32 and three trials
    assert found.all("a", href=f"/v1/jobs/{job_id}/artifacts/plan.json")
    assert "2 KiB" in found.by_id("artifacts").text
    rows = [e for e in found.all("tr") if "title" in e.attributes]
    assert rows[0].attributes["title"] == (
        "conv1\nConv2d 16×1×3×3 · W8A8\n144 parameters · 9.22 k MACs\nshare of cost 25 %\n"
        "144 B · 600 k BOPs\npredicted damage 0.001"
    )
    assert [row.attributes["tabindex"] for row in rows] == ["0", "-1"]
    widths = [e.attributes["width"] for e in found.all("rect", **{"class": "fill"})]
    assert widths == ["33.3", "100.0", "100.0", "0.0"]


def test_trials_say_what_they_changed_of_the_best_before(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    job_id = succeeded(jobs, database_url, trials=2)
    found = page(client, f"/jobs/{job_id}")
    assert "conv1 FP32 → W8" in " ".join(found.by_id("d1").text.split())
    assert "nothing" in found.by_id("trials").text  # trial 2 has the plan of trial 1
    trial = page(client, f"/jobs/{job_id}/trials/2")
    assert "Changes against trial 1 0 of 2 ops" in trial.words
    trial = page(client, f"/jobs/{job_id}/trials/2?against=0")
    assert "Changes against FP32 1 of 2 ops" in trial.words
    page(client, f"/jobs/{job_id}/trials/0")
    page(client, f"/jobs/{job_id}/trials/3", 404)
    page(client, f"/jobs/{job_id}/trials/2?against=9", 404)


def test_a_comparison_tells_what_missed_its_goal(
    client: TestClient, jobs: Jobs, database_url: str
) -> None:
    jobs.submit(submission(), "local")
    claim = claimed(jobs)
    trials = [record(0), record(1, 0.9), record(2, 0.7) | {"meets_goal": False}]
    store(jobs, claim, database_url, trials)
    found = page(client, f"/compare?a={claim.job_id}&b={claim.job_id}")
    dots = [e for e in found.elements if e.attributes.get("class", "").startswith("dot b")]
    kinds = [element.attributes["class"] for element in dots]
    assert (kinds.count("dot b met"), kinds.count("dot b missed")) == (3, 1)  # one is of the key


def test_trials_come_in_pages(client: TestClient, jobs: Jobs, database_url: str) -> None:
    job_id = succeeded(jobs, database_url, trials=120)
    numbers, path = [], f"/jobs/{job_id}"
    for _ in range(3):
        found = page(client, path)
        links = [e for e in found.all("a") if re.fullmatch(r"t\d+", e.attributes.get("id", ""))]
        numbers += [e.attributes["id"][1:] for e in links]
        older = found.all("a", rel="next")
        path = f"/jobs/{job_id}" + (older[0].attributes["href"] if older else "")
    assert numbers == [str(number) for number in range(120, -1, -1)]
    assert not older


def test_the_list_comes_in_pages(
    client: TestClient, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_routes, "PAGE", 2)
    made = [jobs.submit(submission(), "local")[0].id for _ in range(5)]
    seen, path = [], "/?state=queued"
    while path:
        found = page(client, path)
        seen += [e.attributes["id"][1:] for e in found.all("a") if _is_job(e.attributes)]
        older = found.all("a", rel="next")
        path = older[0].attributes["href"] if older else ""
        assert not path or path.startswith("/?state=queued&before=")
    assert seen == made[::-1]


def _is_job(attributes: dict[str, str]) -> bool:
    return attributes.get("href", "") == f"/jobs/{attributes.get('id', ' ')[1:]}"


FILTERS = {
    "": "abc",
    "state=paused": "b",
    "state=live": "abc",
    "state=ended": "",
    "owner=ann": "a",
    "recipe=char-lm": "c",
    "recipe=char-lm&owner=ann": "",
    "label=team:vision": "ab",
    "label=team: vision": "ab",
    "label=team": "",
}


def test_filters(client: TestClient, jobs: Jobs) -> None:
    vision = {"team": "vision"}
    made = {
        "a": jobs.submit(submission(labels=vision), "ann")[0].id,
        "b": jobs.submit(submission(labels=vision), "bob")[0].id,
        "c": jobs.submit(submission(recipe="char-lm"), "bob")[0].id,
    }
    client.post(f"/jobs/{made['b']}/pause")
    for query, names in FILTERS.items():
        found = page(client, f"/?{query}")
        shown = {e.attributes["id"][1:] for e in found.all("a") if _is_job(e.attributes)}
        assert shown == {made[name] for name in names}, query
        assert ("No job is like that" in found.words) == (not names)


def test_what_users_write_is_escaped(client: TestClient, jobs: Jobs, database_url: str) -> None:
    goal = {"metric": EVIL}
    sent = submission(labels={"team": EVIL}, params={EVIL: EVIL}, config={"goal": goal})
    job, _ = jobs.submit(sent, EVIL)
    one = record(1) | {"reason": EVIL, "error": EVIL, "state": "failed"}
    store(jobs, claimed(jobs), database_url, [record(0), one])
    for path in ("/", "/jobs/{}", "/jobs/{}/trials/1", "/compare?a={0}&b={0}", "/submit?like={}"):
        found = page(client, path.format(job.id))
        assert "<script>alert" not in found.html
        assert "&lt;script&gt;alert" in found.html


def test_hostile_names_in_a_filter(client: TestClient) -> None:
    found = page(
        client, "/?" + "&".join(f"{n}=%3Cscript%3E%22" for n in ("state", "owner", "label"))
    )
    assert '<script>"' not in found.html


@pytest.mark.parametrize(
    "path", ["/jobs/x", "/jobs/" + "0" * 26, "/studies/no", "/submit?recipe=no"]
)
def test_what_is_not_there_is_a_page_too(client: TestClient, path: str) -> None:
    found = page(client, path, 404)
    assert found.all("p", role="alert")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/compare?a=%00&b=%00", 422),
        ("/submit?like=%00", 422),
        ("/?owner=%00", 422),
        (f"/studies/s/trials/{2**31}", 404),
        ("/studies/s/trials/" + "9" * 5000, 404),
    ],
)
def test_addresses_that_no_database_takes_are_pages_too(
    client: TestClient, database_url: str, path: str, status: int
) -> None:
    StudyStore.open(database_url, "s", HEADER).close()
    assert page(client, path, status).all("p", role="alert")


@pytest.mark.parametrize("key", ["a\0b", "", "ü", "x" * 300])
def test_a_form_with_an_odd_key_is_taken(client: TestClient, key: str) -> None:
    form = Page(client.get("/submit?recipe=digits-resnet").text).form | {"key": key}
    assert client.post("/submit", data=form, follow_redirects=False).status_code == 303


def test_moves(client: TestClient, jobs: Jobs) -> None:
    job, _ = jobs.submit(submission(), "local")
    for move, origin, target in (
        ("pause", "list", "/"),
        ("resume", "job", f"/jobs/{job.id}"),
        ("cancel", "", f"/jobs/{job.id}"),
    ):
        answer = client.post(
            f"/jobs/{job.id}/{move}", data={"from": origin}, follow_redirects=False
        )
        assert (answer.status_code, answer.headers["location"]) == (303, target)
    assert jobs.get(job.id).state == State.CANCELLED
    refused = client.post(f"/jobs/{job.id}/pause")
    assert refused.status_code == 409
    assert "cannot pause" in Page(refused.text).words


def test_workers_and_queue(client: TestClient, jobs: Jobs, database_url: str) -> None:
    assert "No worker is running" in page(client, "/workers").words
    jobs.submit(submission(), "ann")
    in_state(jobs, database_url, State.PAUSED)
    found = page(client, "/workers")
    assert "waiting 1" in found.words
    assert "ann 1 0 0" in found.words
    assert "local 0 0 1" in found.words


def test_the_report_is_shown_in_a_sandbox(
    client: TestClient, app: FastAPI, jobs: Jobs, database_url: str
) -> None:
    text = b"<h1>report</h1>"
    row = {"name": "report.html", "media_type": "text/html", "size_bytes": len(text)}
    job_id = succeeded(jobs, database_url, artifacts=[{**row, "sha256": "ab" * 32}])
    folder = app.state.services.settings.artifacts_dir / job_id
    folder.mkdir(parents=True)
    (folder / "report.html").write_bytes(text)
    assert page(client, f"/jobs/{job_id}").all("a", href=f"/jobs/{job_id}/report")
    answer = client.get(f"/jobs/{job_id}/report")
    assert answer.content == text
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"sandbox", "default-src 'none'"} <= set(policy)
    assert not [part for part in policy if part.startswith(("script-src", "sandbox allow"))]
    page(client, f"/jobs/{in_state(jobs, database_url, State.QUEUED)}/report", 404)


def test_a_database_that_is_away_is_a_page(
    client: TestClient, app: FastAPI, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise DatabaseError("the database cannot be used: gone")

    monkeypatch.setattr(app.state.services.jobs, "page", fail)
    found = page(client, "/", 503)
    assert "gone" in found.words


def test_with_tokens_there_is_a_login(settings: Any) -> None:
    with guarded(settings) as client:
        answer = client.get("/jobs/x?before=1", headers={"Accept": "text/html"})
        assert answer.status_code == 303
        assert answer.headers["location"] == "/login?next=%2Fjobs%2Fx%3Fbefore%3D1"
        assert client.get("/jobs/live", headers={"X-Fragment": "1"}).status_code == 401
        wrong = client.post("/login", data={"token": "acc_wrong", "next": "/workers"})
        assert wrong.status_code == 401
        assert "unknown, expired or revoked" in Page(wrong.text).words
        secret = bearer(client, Scope.SUBMIT, name="ann")["Authorization"].split()[1]
        for target, expected in (("/workers", "/workers"), ("//evil.example", "/"), ("x", "/")):
            answer = client.post("/login", data={"token": secret, "next": target})
            assert (answer.status_code, answer.headers["location"]) == (303, expected)
        found = page(client, "/")
        assert len(found.all("form", action="/logout")) == 1
        (csrf,) = {e.attributes["value"] for e in found.all("input", name="csrf_token")}
        assert len(csrf) == 64
        assert client.post("/logout").status_code == 403
        assert client.post("/logout", data={"csrf_token": csrf}).status_code == 303
        assert client.get("/", headers={"Accept": "text/html"}).status_code == 303


def test_a_session_changes_only_its_own_jobs(settings: Any) -> None:
    with guarded(settings) as client:
        jobs = client.app.state.services.jobs  # type: ignore[attr-defined]
        own, other = (jobs.submit(submission(), name)[0].id for name in ("ann", "bob"))
        secret = bearer(client, Scope.SUBMIT, name="ann")["Authorization"].split()[1]
        client.post("/login", data={"token": secret})
        found = page(client, "/")
        forms = {e.attributes["action"] for e in found.all("form", method="post")}
        assert forms == {"/logout", f"/jobs/{own}/pause", f"/jobs/{own}/cancel"}
        csrf = found.all("input", name="csrf_token")[0].attributes["value"]
        assert client.post(f"/jobs/{own}/pause").status_code == 403
        for job_id, status in ((own, 303), (other, 403)):
            for move in ("pause", "resume", "cancel"):
                answer = client.post(f"/jobs/{job_id}/{move}", data={"csrf_token": csrf})
                assert answer.status_code == status


def test_a_reader_sees_no_way_to_submit(settings: Any) -> None:
    with guarded(settings) as client:
        secret = bearer(client, Scope.READ, name="eve")["Authorization"].split()[1]
        client.post("/login", data={"token": secret})
        assert not page(client, "/").all("a", href="/submit")
        page(client, "/submit", 403)


def test_the_palette_is_the_report_s() -> None:
    report = (ROOT / "tuner/report/report.html").read_text()
    own = (STATIC / "dashboard.css").read_text()
    colours = re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]+)", report)
    assert len(colours) > 50
    for name, value in colours:
        assert f"{name}: {value}" in own
    plots = (STATIC / "plots.css").read_text()
    assert re.findall(r"^\.b(\d+) ", plots, re.MULTILINE) == [str(bits) for bits in SHADES]
