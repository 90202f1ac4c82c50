"""The dashboard in Chromium: submit → live progress → result → compare → cancel."""

import re
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from playwright.sync_api import Page, expect

from server.jobs import Jobs
from server.states import Move
from tests.server.browser.conftest import Complaints, Open, Server
from tests.server.helpers import submission

Shot = Callable[[Page, str], None]
LOOKS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
PATIENCE_MS = 240_000
expect.set_options(timeout=90_000)


def jobs_of(server: Server) -> Jobs:
    """Return the queue behind a service."""
    app: FastAPI = server.app
    jobs: Jobs = app.state.services.jobs
    return jobs


def submit(page: Page, trials: int, **fields: str) -> str:
    """Submit a job by the form; return its id."""
    page.get_by_role("link", name=re.compile("digits-resnet")).click()
    page.get_by_label("Epochs").fill("1")
    page.get_by_label("Trials").fill(str(trials))
    for label, text in fields.items():
        page.get_by_label(label).fill(text)
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**/jobs/*")
    return page.url.rpartition("/")[2]


@pytest.mark.usefixtures("worker")
def test_from_the_first_job_to_the_comparison(open_page: Open, server: Server, shots: Shot) -> None:
    page = open_page("/")
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible()
    shots(page, "empty")
    page.get_by_role("link", name="Submit the first job").click()
    shots(page, "recipes")
    first = submit(page, 6, Labels="team: vision")
    numbers: list[int] = []
    row = page.locator("#trials tbody tr")
    numbers.append(row.count())  # now: the trials of a quick machine all come at once
    expect(row.first).to_be_visible()  # the first trial came without a reload
    shots(page, "live")
    expect(page.locator("#top .badge")).to_have_text("succeeded", timeout=PATIENCE_MS)
    expect(row).to_have_count(7)
    assert numbers[0] < 7
    expect(page.locator("#scatter .plot .best").first).to_be_attached()
    expect(page.locator("#bitmap tbody tr")).to_have_count(16)
    expect(page.get_by_role("link", name="weights.safetensors")).to_be_visible()
    expect(page.locator("#said")).to_contain_text("succeeded, 6 of 6 trials")
    expect(page.locator("#lost")).to_be_hidden()
    with page.expect_download() as download:
        page.get_by_role("link", name="plan.json").click()
    assert '"ops"' in download.value.path().read_text()

    page.goto("/submit")
    second = submit(page, 3)
    expect(page.locator("#top .badge")).to_have_text("succeeded", timeout=PATIENCE_MS)
    page.get_by_role("link", name="Compare").last.click()
    page.locator("#pick-b").select_option(first)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".versus")).to_contain_text(second[-6:])
    expect(page.locator(".front-a, .front-b")).to_have_count(2)

    for width, scheme in LOOKS:
        look = f"{width}-{scheme}"
        for name, path in {
            "list": "/",
            "job": f"/jobs/{first}",
            "trial": f"/jobs/{first}/trials/2",
            "submit": "/submit?recipe=arrays",
            "compare": f"/compare?a={first}&b={second}",
            "workers": "/workers",
            "studies": "/studies",
        }.items():
            page = open_page(path, width, scheme)
            shots(page, f"{name}-{look}")
            page.context.close()  # it would go on asking


def test_the_report_opens_in_a_sandbox(
    open_page: Open, server: Server, complaints: Complaints
) -> None:
    done = [job for job in jobs_of(server).page(10) if job.state == "succeeded"]
    page = open_page(f"/jobs/{done[-1].id}")
    path = page.get_by_role("link", name="Report", exact=True).get_attribute("href")
    assert path is not None
    answer = page.goto(path)
    assert answer is not None
    assert answer.status == 200
    assert answer.headers["content-security-policy"].startswith("sandbox; ")
    # the browser says that it keeps the test's own scripts from running there
    complaints.found = [one for one in complaints.found if "sandboxed" not in one]


@pytest.mark.parametrize("width", [1280, 390])
def test_cancel_asks_once_more(open_page: Open, server: Server, width: int) -> None:
    job, _ = jobs_of(server).submit(submission(priority=-1000), "local")
    jobs_of(server).ask(job.id, Move.PAUSE)
    page = open_page("/", width)
    row = page.locator("tr", has=page.locator(f"#j{job.id}"))
    row.get_by_text("Cancel", exact=True).click()
    page.keyboard.press("Escape")
    expect(row.get_by_role("button", name="Yes, end it for good")).to_be_hidden()
    row.get_by_text("Cancel", exact=True).click()
    row.get_by_role("button", name="Yes, end it for good").click()
    expect(row.locator(".badge")).to_have_text("cancelled")
    assert jobs_of(server).get(job.id).state == "cancelled"


def test_the_list_follows_what_others_do(open_page: Open, server: Server) -> None:
    page = open_page("/?state=paused")
    job, _ = jobs_of(server).submit(submission(), "local")
    jobs_of(server).ask(job.id, Move.PAUSE)
    expect(page.locator(f"#j{job.id}")).to_be_visible()
    jobs_of(server).ask(job.id, Move.CANCEL)
    expect(page.locator(f"#j{job.id}")).to_be_hidden()


def test_a_lost_connection_is_said_and_mended(
    open_page: Open, server: Server, complaints: Complaints
) -> None:
    job, _ = jobs_of(server).submit(submission(), "local")
    jobs_of(server).ask(job.id, Move.PAUSE)
    page = open_page(f"/jobs/{job.id}")
    expect(page.locator("#top .badge")).to_have_text("paused")
    server.stop()
    expect(page.locator("#lost")).to_be_visible()
    server.start()
    expect(page.locator("#lost")).to_be_hidden()
    jobs_of(server).ask(job.id, Move.CANCEL)
    expect(page.locator("#top .badge")).to_have_text("cancelled")
    assert complaints.found  # the browser did see it
    complaints.found.clear()


def test_keyboard_and_tooltips(open_page: Open, server: Server) -> None:
    done = [job for job in jobs_of(server).page(10) if job.state == "succeeded"]
    page = open_page("/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("/")
    expect(page.locator("#filter")).to_be_focused()
    page = open_page(f"/jobs/{done[-1].id}", 390)
    first = page.locator("#bitmap tbody tr").first
    first.focus()
    tip = page.locator("#tip")
    expect(tip).to_contain_text("predicted damage")
    name = first.locator("td").first.inner_text()
    expect(tip).to_contain_text(name)
    page.keyboard.press("ArrowDown")
    expect(page.locator("#bitmap tbody tr").nth(1)).to_be_focused()
    box = tip.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_the_colours_stay_chosen(open_page: Open) -> None:
    page = open_page("/")
    root = page.locator("html")
    page.locator("#theme").click()
    page.locator("#theme").click()
    expect(root).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(root).to_have_attribute("data-theme", "dark")
    page.locator("#theme").click()
    expect(root).not_to_have_attribute("data-theme", "dark")


def test_all_works_without_javascript(open_page: Open, server: Server) -> None:
    page = open_page("/submit?recipe=digits-resnet", js=False)
    page.get_by_label("Trials").fill("2")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#top .badge")).to_have_text(re.compile("queued|running"))
    page.get_by_text("Cancel", exact=True).click()
    page.get_by_role("button", name="Yes, end it for good").click()
    expect(page.locator("#top .badge")).to_have_text(re.compile("cancelled|cancelling"))
