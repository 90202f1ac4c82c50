"""The form that submits a job: drawn from a schema, read back, wrong at the right field."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, Field

from server.app import create_app
from server.catalog import Catalog
from server.dashboard import forms, submission
from server.jobs import Jobs
from server.schemas import Submission
from tests.server.access import LocalClient, on_sqlite
from tests.server.dashboard_pages import Page
from tests.server.helpers import submission as sent
from tuner.recipes import RECIPES


class Inner(BaseModel):
    """A nested model."""

    low: int = 0


class Every(BaseModel):
    """One of every kind of field."""

    model_config = ConfigDict(extra="forbid")

    needed: int
    whole: int = Field(default=3, ge=1, lt=10, description="A whole number.")
    part: float = Field(default=0.5, gt=0)
    limit: float | None = None
    depth: int | None = 4
    on: bool = True
    off: bool = False
    maybe: bool | None = None
    kind: Literal["a", "b"] = "a"
    size: Literal[1, 2] = 1
    word: str = ""
    inner: Inner = Inner()
    many: list[int] = []


SCHEMA = Every.model_json_schema()
KINDS = {
    "needed": "integer",
    "whole": "integer",
    "part": "number",
    "limit": "number",
    "depth": "integer",
    "on": "boolean",
    "off": "boolean",
    "maybe": "choice",
    "kind": "choice",
    "size": "choice",
    "word": "text",
    "inner": "json",
    "many": "json",
}


def sent_by_browser(fields: tuple[forms.Field, ...]) -> dict[str, str]:
    """Return what a browser sends of these fields, untouched."""
    shown = {field.name: field.value for field in fields}
    checks = {field.name for field in fields if field.kind == "boolean"}
    return {n: "on" if n in checks else v for n, v in shown.items() if v or n not in checks}


def test_the_kinds_of_fields() -> None:
    fields = forms.fields_of(SCHEMA, {}, {})
    assert {field.name: field.kind for field in fields} == KINDS
    by_name = {field.name: field for field in fields}
    assert [field.name for field in fields if field.required] == ["needed"]
    whole = by_name["whole"]
    assert (whole.minimum, whole.maximum, whole.value) == (1, 9, "3")
    assert (whole.label, whole.help) == ("Whole", "A whole number.")
    assert by_name["part"].minimum == 0
    assert [choice.value for choice in by_name["maybe"].choices] == ["", "true", "false"]
    assert [choice.value for choice in by_name["size"].choices] == ["1", "2"]


@pytest.mark.parametrize(
    "values",
    [
        {"needed": 1},
        {"needed": -7, "whole": 9, "part": 1e-7, "limit": 2.5, "depth": None, "on": False},
        {"needed": 0, "off": True, "maybe": False, "kind": "b", "size": 2, "word": "a  b"},
        {"needed": 2, "maybe": True, "inner": {"low": 4}, "many": [1, 2], "limit": 1e16},
    ],
)
def test_forms_round_trip(values: dict[str, Any]) -> None:
    model = Every(**values)
    fields = forms.fields_of(SCHEMA, model.model_dump(mode="json"), {}, "p.")
    assert Every(**forms.read(SCHEMA, sent_by_browser(fields), "p.")) == model


def test_an_untouched_form_is_the_default() -> None:
    fields = forms.fields_of(SCHEMA, {"needed": 5}, {})
    assert Every(**forms.read(SCHEMA, sent_by_browser(fields))) == Every(needed=5)


def test_what_cannot_be_read_stays_as_it_was_written() -> None:
    form = {"needed": "x", "whole": "1.5", "many": "[1,", "kind": "zzz"}
    values = forms.read(SCHEMA, form)
    assert values["needed"] == "x"
    shown = {field.name: field.value for field in forms.fields_of(SCHEMA, values, {})}
    assert {name: shown[name] for name in form} == form


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_form(name: str) -> None:
    form = submission.shown(RECIPES[name], {}, {})
    assert [field.name for field in form.params] == [
        f"params.{field}" for field in RECIPES[name].parameters.model_fields
    ]


GOALS = (
    {},
    {"max_drop": 0.003},
    {"max_drop": 0.07, "higher_is_better": False},
    {"max_drop": 2.5, "relative": False, "metric": "bleu"},
    {"at_least": 0.9125},
    {"at_most": -3.0},
)
CONFIGS = (
    {},
    {"space": "int8", "strategy": "tpe", "objective": "size", "max_trials": 0, "seed": 7},
    {"timeout_s": 90.5, "calib_samples": 32},
    {"space": {"preset": "int8", "rules": [{"op_types": ["Linear"], "options": [{}]}]}},
)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_submission_round_trips(goal: dict[str, Any], config: dict[str, Any]) -> None:
    labels = {"team": "vision", "note": "a: b"}
    given = sent(
        config={**config, "goal": goal}, labels=labels, priority=-5, timeout_s=60, max_attempts=7
    )
    recipe = RECIPES[given.recipe]
    form = submission.shown(recipe, given.params, submission.texts_of(given))
    fields = (*form.params, *form.goal, *form.search, *form.job, *form.more)
    read = submission.read(sent_by_browser(fields), recipe, Catalog(RECIPES))
    assert read.errors == {}
    assert read.submission is not None
    expected = given.model_dump(mode="json")
    assert _spelled(read.submission) == _spelled(Submission.model_validate(expected))


def _spelled(one: Submission) -> dict[str, Any]:
    """Return what a submission means: spaces, directions and defaults spelled out."""
    config = one.config
    goal = config.goal.model_dump() | {"higher_is_better": config.goal.prefers_higher}
    if config.goal.is_absolute:
        goal = {name: goal[name] for name in ("at_least", "at_most", "metric")}
    body = one.model_dump(mode="json", exclude={"config", "params"})
    rest = config.model_dump(exclude={"goal", "space"})
    epochs = one.params["epochs"]
    return {**body, **rest, "goal": goal, "space": config.search_space, "epochs": epochs}


WRONG = {
    "params.epochs": ({"params.epochs": "0"}, "greater than or equal to 1"),
    "goal.amount": ({"goal.amount": "much"}, "'much' is no number"),
    "config.max_trials": ({"config.max_trials": "-1"}, "greater than or equal to 0"),
    "config.space": ({"config.space": "int9"}, "unknown space"),
    "config.timeout_s": ({"config.timeout_s": "0"}, "leaves no time"),
    "priority": ({"priority": "1001"}, "less than or equal to 1000"),
    "labels": ({"labels": "vision"}, "name: value"),
    "rules": ({"rules": "[{"}, "no JSON"),
    "max_attempts": ({"max_attempts": "0"}, "greater than or equal to 1"),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with LocalClient(create_app(on_sqlite(tmp_path_factory.mktemp("forms")))) as client:
        yield client


def _jobs(client: TestClient) -> Jobs:
    jobs: Jobs = client.app.state.services.jobs  # type: ignore[attr-defined]
    return jobs


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_shown_at_its_field(client: TestClient, name: str) -> None:
    changed, message = WRONG[name]
    before = len(_jobs(client).page(1000))
    form = Page(client.get("/submit?recipe=digits-resnet").text).form | changed
    answer = client.post("/submit", data=form, follow_redirects=False)
    assert answer.status_code == 422
    found = Page(answer.text)
    (field,) = [e for e in found.elements if "aria-invalid" in e.attributes]
    assert field.attributes["name"] == name
    error = found.by_id(field.attributes["aria-describedby"].split()[0])
    assert message in error.text
    assert f"#{field.attributes['id']}" in [e.attributes.get("href") for e in found.elements]
    assert found.form[name] == changed[name]
    assert len(_jobs(client).page(1000)) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"goal.kind": "absolute", "goal.amount": "sNaN"}, "'sNaN' is no number"),
        ({"goal.kind": "relative", "goal.amount": "1e9999999"}, "'1e9999999' is no number"),
        ({"rules": "[" * 100_000}, "nest deeper than 100 levels"),
        ({"rules": "[" * 101 + "]" * 101}, "nest deeper than 100 levels"),
    ],
)
def test_texts_that_python_itself_chokes_on(
    client: TestClient, changed: dict[str, str], message: str
) -> None:
    form = Page(client.get("/submit?recipe=digits-resnet").text).form | changed
    answer = client.post("/submit", data=form, follow_redirects=False)
    assert answer.status_code == 422
    assert message in Page(answer.text).words


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 200 + "1" + "}" * 200])
def test_json_that_nests_too_deep_stays_text(text: str) -> None:
    schema = {"properties": {"any": {"type": "object"}}}
    assert forms.read(schema, {"any": text}) == {"any": text}


def test_an_untouched_form_is_submitted_once(client: TestClient) -> None:
    form = Page(client.get("/submit?recipe=digits-resnet").text).form
    first = client.post("/submit", data=form, follow_redirects=False)
    assert first.status_code == 303
    again = client.post("/submit", data=form, follow_redirects=False)
    assert again.headers["location"] == first.headers["location"]
    job = _jobs(client).get(first.headers["location"].rpartition("/")[2])
    assert (job.recipe, job.config["space"], job.owner) == ("digits-resnet", "mixed-int", "local")
    other = client.post("/submit", data=form | {"key": "other"}, follow_redirects=False)
    assert other.headers["location"] != first.headers["location"]


def test_a_copy_has_what_the_job_had(client: TestClient) -> None:
    given = sent(labels={"team": "vision"}, config={"goal": {"at_least": 0.9}, "max_trials": 7})
    job, _ = _jobs(client).submit(given, "local")
    form = Page(client.get(f"/submit?like={job.id}").text).form
    answer = client.post("/submit", data=form, follow_redirects=False)
    copy = _jobs(client).get(answer.headers["location"].rpartition("/")[2])
    assert copy.id != job.id
    assert (copy.labels, copy.config["max_trials"]) == (job.labels, 7)
    assert copy.config["goal"]["at_least"] == 0.9
    assert copy.params["epochs"] == 1


def test_uploads_are_chosen_by_their_names(client: TestClient, tmp_path: Path) -> None:
    assert "tuner upload FILE" in client.get("/submit?recipe=arrays").text
    path = tmp_path / "data.npz"
    np.savez(path, inputs=np.zeros(3, np.float32))
    sent = client.post(
        "/v1/assets?kind=npz&name=digits+<1>",
        content=path.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    ).json()
    found = Page(client.get("/submit?recipe=arrays").text)
    (option,) = [e for e in found.all("option") if e.attributes["value"] == sent["id"]]
    assert option.text.startswith("digits <1> · ")
    assert found.words.count("tuner upload FILE") == 1  # for the weights, of which there are none
    form = found.form | {"params.data": "0" * 64}
    answer = Page(client.post("/submit", data=form).text)
    assert answer.form["params.data"] == "0" * 64


def test_a_full_queue_is_said(tmp_path: Path) -> None:
    with LocalClient(create_app(on_sqlite(tmp_path, max_queued_jobs=1))) as client:
        _jobs(client).submit(sent(), "local")
        form = Page(client.get("/submit?recipe=digits-resnet").text).form
        answer = client.post("/submit", data=form)
        assert answer.status_code == 422
        assert "are waiting already" in Page(answer.text).words
