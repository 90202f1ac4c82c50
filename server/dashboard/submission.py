"""The form that submits a job: what it shows, and the Submission that it stands for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from pydantic import ValidationError

from server import strict_json
from server.catalog import Catalog
from server.dashboard import forms
from server.dashboard.forms import Choice, Field
from server.errors import InvalidError
from server.schemas import Asset, Submission
from strategies import STRATEGIES
from tuner.config import PRESETS, TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.recipes import Recipe
from tuner.report.text import size

PARAMS = "params."
_GOALS = {
    "relative": "drop, in % of FP32's",
    "absolute": "drop, absolute",
    "at_least": "at least",
    "at_most": "at most",
}
_OBJECTIVES = {"bops": "bit operations", "size": "size"}
_DIRECTIONS = {"higher": "higher is better", "lower": "lower is better"}


@dataclass(frozen=True)
class Read:
    """What a form came to: a submission, or what is wrong by the name of its field."""

    submission: Submission | None
    errors: Mapping[str, str]


@dataclass(frozen=True)
class SubmitForm:
    """The fields of the form in their groups; `errors` belong to no field."""

    recipe: Recipe
    params: tuple[Field, ...]
    goal: tuple[Field, ...]
    search: tuple[Field, ...]
    job: tuple[Field, ...]
    more: tuple[Field, ...]
    errors: tuple[str, ...] = ()

    @property
    def is_more_open(self) -> bool:
        """Whether something in the group that is folded away is wrong or was filled in."""
        return any(field.error or field.value for field in self.more)


def shown(
    recipe: Recipe,
    params: Mapping[str, Any],
    texts: Mapping[str, str],
    errors: Mapping[str, str] | None = None,
) -> SubmitForm:
    """Return the form of a recipe; `texts` holds what the other fields show, by their names."""
    wrong = dict(errors or {})
    at_params = {k.removeprefix(PARAMS): v for k, v in wrong.items() if k.startswith(PARAMS)}
    schema = recipe.parameters.model_json_schema()
    groups = {
        name: tuple(_filled(field, texts, wrong) for field in fields)
        for name, fields in _GROUPS.items()
    }
    own = forms.fields_of(schema, params, at_params, PARAMS)
    known = {field.name for fields in (own, *groups.values()) for field in fields}
    unplaced = tuple(f"{k}: {v}" if k else v for k, v in wrong.items() if k not in known)
    return SubmitForm(recipe, own, **groups, errors=unplaced)


def with_uploads(form: SubmitForm, uploads: Sequence[Asset]) -> SubmitForm:
    """Return the form with a selection of the owner's uploads wherever a field names one."""
    return replace(form, params=tuple(_naming(field, uploads) for field in form.params))


def _naming(field: Field, uploads: Sequence[Asset]) -> Field:
    if not field.upload:
        return field
    fitting = [asset for asset in uploads if asset.kind == field.upload]
    if not fitting:
        return replace(field, help=f"{field.help} Send it first: tuner upload FILE".strip())
    known = [Choice(asset.id, f"{asset.name} · {size(asset.size_bytes)}") for asset in fitting]
    if field.value not in ("", *(choice.value for choice in known)):
        known.append(Choice(field.value, f"{field.value[:12]}…"))
    return replace(field, kind="choice", choices=(Choice("", "choose an upload"), *known))


def read(form: Mapping[str, str], recipe: Recipe, catalog: Catalog) -> Read:
    """Return the submission that a form stands for, or what is wrong with it."""
    params = forms.read(recipe.parameters.model_json_schema(), form, PARAMS)
    errors: dict[str, str] = {}
    try:
        params = catalog.checked(recipe.name, params)
    except InvalidError as error:
        for one in error.details.get("errors", ()):
            parts = one["pointer"].strip("/").split("/")
            errors.setdefault(".".join(parts[:2]), one["detail"])
    body = _body(form, recipe.name, params, errors)
    try:
        submission = Submission.model_validate(body)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            errors.setdefault(_field_name(found["loc"]), found["msg"].removeprefix("Value error, "))
        return Read(None, errors)
    return Read(None if errors else submission, errors)


def texts_of(submission: Submission) -> dict[str, str]:
    """Return what the fields show for a submission; the recipe's parameters apart."""
    config, goal = submission.config, submission.config.goal
    space = config.search_space
    labels = "\n".join(f"{name}: {value}" for name, value in submission.labels.items())
    rules = [rule.model_dump(mode="json", exclude_none=True) for rule in space.rules]
    return {
        **_goal_texts(goal),
        "goal.metric": goal.metric or "",
        "config.space": space.preset,
        "config.strategy": config.strategy,
        "config.objective": config.objective,
        "config.max_trials": str(config.max_trials),
        "config.timeout_s": _text(config.timeout_s),
        "config.seed": str(config.seed),
        "priority": str(submission.priority),
        "labels": labels,
        "config.calib_samples": _text(config.calib_samples),
        "rules": json.dumps(rules, indent=1) if rules else "",
        "max_attempts": ""
        if submission.max_attempts == _DEFAULT_ATTEMPTS
        else str(submission.max_attempts),
        "timeout_s": _text(submission.timeout_s),
    }


def _goal_texts(goal: AccuracyGoal) -> dict[str, str]:
    if goal.at_least is not None:
        kind, amount = "at_least", _text(goal.at_least)
    elif goal.at_most is not None:
        kind, amount = "at_most", _text(goal.at_most)
    elif goal.relative:
        kind, amount = "relative", _percent(goal.max_drop)
    else:
        kind, amount = "absolute", _text(goal.max_drop)
    direction = "higher" if goal.prefers_higher else "lower"
    return {"goal.kind": kind, "goal.amount": amount, "goal.direction": direction}


def _body(
    form: Mapping[str, str], recipe: str, params: Mapping[str, Any], errors: dict[str, str]
) -> dict[str, Any]:
    """Return the JSON of a submission; what cannot be said in JSON goes to `errors`."""
    config: dict[str, Any] = {"goal": _goal(form, errors)}
    space = form.get("config.space", "").strip()
    rules = _rules(form, errors)
    config["space"] = {"preset": space, "rules": rules} if rules else space
    for name in ("strategy", "objective"):
        config[name] = form.get(f"config.{name}", "").strip()
    for name in ("max_trials", "seed", "calib_samples"):
        config[name] = forms.number(form.get(f"config.{name}", "").strip(), "integer")
    config["timeout_s"] = forms.number(form.get("config.timeout_s", "").strip())
    body = {
        "recipe": recipe,
        "params": dict(params),
        "config": {name: value for name, value in config.items() if value != ""},
        "priority": forms.number(form.get("priority", "").strip(), "integer"),
        "labels": _labels(form, errors),
        "max_attempts": forms.number(form.get("max_attempts", "").strip(), "integer"),
        "timeout_s": forms.number(form.get("timeout_s", "").strip()),
    }
    return {name: value for name, value in body.items() if value != ""}


def _goal(form: Mapping[str, str], errors: dict[str, str]) -> dict[str, Any]:
    kind, text = form.get("goal.kind", "relative"), form.get("goal.amount", "").strip()
    metric = form.get("goal.metric", "").strip() or None
    goal: dict[str, Any] = {"metric": metric}
    if kind != "at_least" and kind != "at_most":
        goal["higher_is_better"] = form.get("goal.direction", "higher") != "lower"
        goal["relative"] = kind == "relative"
    if kind not in _GOALS:
        errors["goal.kind"] = f"{kind!r} is none of {', '.join(_GOALS)}"
    try:
        amount = float(Decimal(text) / 100 if kind == "relative" else Decimal(text))
    except (ArithmeticError, ValueError):  # also of "1e9999999" and "sNaN"
        errors["goal.amount"] = f"{text!r} is no number" if text else "give a number"
        return goal
    goal[kind if kind.startswith("at_") else "max_drop"] = amount
    return goal


def _rules(form: Mapping[str, str], errors: dict[str, str]) -> Any:
    text = form.get("rules", "").strip()
    try:
        return strict_json.loads(text) if text else []
    except ValueError as error:
        errors["rules"] = f"this is no JSON: {error}"
        return []


def _labels(form: Mapping[str, str], errors: dict[str, str]) -> dict[str, str]:
    labels = {}
    for line in form.get("labels", "").splitlines():
        name, separator, value = line.partition(":")
        if not line.strip():
            continue
        if not separator:
            errors["labels"] = f"{line!r} is no label: write one a line, as name: value"
        labels[name.strip()] = value.strip()
    return labels


def _field_name(place: tuple[Any, ...]) -> str:
    """Return the field that a part of a submission comes from."""
    parts = [str(part) for part in place]
    if parts[:2] == ["config", "goal"]:
        amounts = ("max_drop", "at_least", "at_most")
        return "goal.amount" if len(parts) < 3 or parts[2] in amounts else f"goal.{parts[2]}"
    if parts[:2] == ["config", "space"]:
        return "rules" if "rules" in parts else "config.space"
    return ".".join(parts[:2]) if parts[0] == "config" else parts[0]


def _filled(field: Field, texts: Mapping[str, str], errors: Mapping[str, str]) -> Field:
    text = texts.get(field.name, field.value)
    known = [choice.value for choice in field.choices]
    more = (Choice(text, text),) if known and text not in known else ()
    return replace(field, value=text, choices=(*field.choices, *more), error=errors.get(field.name))


def _text(value: float | int | None) -> str:
    return "" if value is None else f"{value!r}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{(Decimal(repr(share)) * 100).normalize():f}"


def _choices(names: Mapping[str, str]) -> tuple[Choice, ...]:
    return tuple(Choice(value, label) for value, label in names.items())


def _same(names: tuple[str, ...]) -> tuple[Choice, ...]:
    return tuple(Choice(name, name) for name in names)


_DEFAULT_ATTEMPTS = 3
_DEFAULT = TuningConfig()
_MAX_SEED = 2**31 - 1
_GROUPS: dict[str, tuple[Field, ...]] = {
    "goal": (
        Field("goal.kind", "Limit", "choice", "relative", choices=_choices(_GOALS)),
        Field(
            "goal.amount",
            "Amount",
            "number",
            "1",
            "A hard limit: what is returned met it.",
            required=True,
        ),
        Field(
            "goal.direction",
            "Direction",
            "choice",
            "higher",
            "Of a goal that is a drop.",
            choices=_choices(_DIRECTIONS),
        ),
        Field("goal.metric", "Metric", "text", "", "Where eval_func returns several; else empty."),
    ),
    "search": (
        Field("config.space", "Space", "choice", "mixed-int", choices=_same(PRESETS)),
        Field("config.objective", "Make small", "choice", "bops", choices=_choices(_OBJECTIVES)),
        Field("config.strategy", "Strategy", "choice", "auto", choices=_same(tuple(STRATEGIES))),
        Field(
            "config.max_trials",
            "Trials",
            "integer",
            str(_DEFAULT.max_trials),
            "Evaluations beside FP32's.",
            required=True,
            minimum=0,
        ),
        Field("config.timeout_s", "Time, s", "number", "", "Empty: no limit.", minimum=0),
        Field("config.seed", "Seed", "integer", "0", required=True, minimum=0, maximum=_MAX_SEED),
    ),
    "job": (
        Field("priority", "Priority", "integer", "0", "Higher first.", minimum=-1000, maximum=1000),
        Field("labels", "Labels", "json", "", "One a line, as name: value."),
    ),
    "more": (
        Field(
            "config.calib_samples",
            "Calibration samples",
            "integer",
            "",
            "Empty: all of them.",
            minimum=1,
        ),
        Field(
            "max_attempts",
            "Attempts",
            "integer",
            "",
            f"After crashes; empty: {_DEFAULT_ATTEMPTS}.",
            minimum=1,
            maximum=100,
        ),
        Field("timeout_s", "Job's time, s", "number", "", "After which it fails.", minimum=0),
        Field("rules", "Rules of the space", "json", "", "JSON: a list of Rule objects."),
    ),
}
