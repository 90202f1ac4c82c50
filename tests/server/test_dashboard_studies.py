"""The dashboard's pages of library runs, which belong to no job."""

import torch
from fastapi.testclient import TestClient

from server.jobs import Jobs
from tests.server.dashboard_pages import EVIL, page
from tests.server.helpers import HEADER, record, succeeded
from tuner import AccuracyGoal, TuningConfig, quantization
from tuner.storage import StudyStore


def test_studies_of_the_library(client: TestClient, jobs: Jobs, database_url: str) -> None:
    succeeded(jobs, database_url)
    assert "No library runs yet" in page(client, "/studies").words
    name = f"a/b ? {EVIL}"
    study = StudyStore.open(database_url, name, HEADER)
    for number in range(3):
        study.add(number, record(number))
    study.close()
    listed = page(client, "/studies")
    (link,) = [e for e in listed.all("a") if e.text == name]
    found = page(client, link.attributes["href"])
    assert name in found.words
    assert not found.all("line", **{"class": "goal"})  # nobody kept it
    assert "kept no goal" in found.words
    (trial,) = [e for e in found.all("a") if e.attributes.get("id") == "t2"]
    assert "Trial 2" in page(client, trial.attributes["href"]).words
    page(client, f"{link.attributes['href']}?cost=size")


def test_a_study_with_nothing_but_its_baseline_has_no_goal_line(
    client: TestClient, database_url: str
) -> None:
    study = StudyStore.open(database_url, "s", HEADER)
    study.add(0, record(0))
    study.close()
    found = page(client, "/studies/s")
    assert found.all("svg", **{"class": "plot"})
    assert not found.all("line", **{"class": "goal"})


def test_a_run_of_the_library_shows_its_goal(client: TestClient, database_url: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    goal = AccuracyGoal(at_most=0.5)
    data, config = [torch.ones(2, 4)], TuningConfig(goal=goal, max_trials=1)
    quantization.fit(
        model, data, lambda _: 0.25, config, storage=database_url, study_name="s", progress=False
    )
    found = page(client, "/studies/s")
    assert "Goal accuracy ≤ 0.5" in found.words
    assert found.all("line", **{"class": "goal"})
    assert "kept no goal" not in found.words


def test_a_job_is_no_study(client: TestClient, jobs: Jobs, database_url: str) -> None:
    job_id = succeeded(jobs, database_url)
    page(client, f"/studies/{jobs.get(job_id).study_name}", 404)
