"""Jobs, trials, recipes and tokens as text."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.client import JobEvent
from server.client.waiting import describe_best
from server.db.models import TokenRow
from server.schemas import Job, RecipeInfo, Trial
from server.states import State
from tuner.report import text

out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)

_STYLES = {
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.CANCELLED: "yellow",
    State.RUNNING: "cyan",
}
_MET: dict[bool | None, str] = {True: "met", False: "missed", None: ""}
_MARKS = {True: "[green]met[/]", False: "[yellow]missed[/]", None: ""}


def show_json(items: Iterable[BaseModel | Mapping[str, Any]]) -> None:
    """Print one JSON object a line."""
    for item in items:
        line = item.model_dump_json() if isinstance(item, BaseModel) else json.dumps(item)
        sys.stdout.write(line + "\n")


def jobs(items: Iterable[Job]) -> Table:
    """Return a row for every job."""
    table = _table("id", "recipe", "state", ">trials", "goal", "best", "owner", ">age")
    for job in items:
        table.add_row(
            job.id,
            _plain(job.recipe),
            f"[{_STYLES.get(job.state, '')}]{job.state}[/]" if job.state in _STYLES else job.state,
            f"{job.progress.trials}/{job.progress.max_trials}",
            _MARKS[job.goal_met],
            describe_best(job),
            _plain(job.owner),
            _age(job.created_at),
        )
    return table


def job(item: Job, baseline: Trial | None) -> Table:
    """Return everything about a job; the baseline's costs are what the best's are shares of."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _job_rows(item, baseline):
        if value:
            table.add_row(name, value)
    return table


def trials(items: Sequence[Trial], best: int | None) -> Table:
    """Return a row for every trial; number 0, where it is among them, is the baseline."""
    table = _table(">trial", ">accuracy", "goal", ">bops", ">size", ">seconds", "why")
    baseline = next((trial for trial in items if trial.number == 0), None)
    for trial in items:
        why = trial.error.strip().rpartition("\n")[2] if trial.error else trial.reason
        table.add_row(
            str(trial.number),
            _accuracy(trial.state, trial.accuracy),
            _MARKS[trial.meets_goal],
            _share(trial, baseline, "bops"),
            _share(trial, baseline, "size_bytes"),
            f"{trial.duration_s:.2f}",
            _plain(why),
            style="bold" if trial.number == best else "",
        )
    return table


def event(item: JobEvent) -> str:
    """Return an event in one line."""
    data = item.data
    if item.kind == "trial":
        name = "baseline" if data.get("number") == 0 else f"trial {data.get('number')}"
        accuracy = _accuracy(data.get("state"), data.get("accuracy"))
        met = _MET.get(data.get("meets_goal"), "")
        return f"{name:<10} {accuracy:<8} {met:<6}  {_plain(str(data.get('reason', '')))}"
    if item.kind == "state":
        told = data.get("reason") or data.get("stop_reason") or ""
        return f"{data.get('state')}  {_plain(str(told))}".rstrip()
    return _plain(f"{item.kind:<10} {' '.join(str(value) for value in data.values())}")


def recipes(items: Iterable[RecipeInfo]) -> Table:
    """Return a row for every recipe."""
    table = _table("recipe", "parameters", "what it is")
    for recipe in items:
        properties = recipe.parameters.get("properties", {})
        parameters = ", ".join(map(_parameter, properties.items()))
        table.add_row(_plain(recipe.name), _plain(parameters), _plain(recipe.summary))
    return table


def tokens(rows: Iterable[TokenRow]) -> Table:
    """Return a row for every token; what it is itself is not known."""
    table = _table("id", "name", "scopes", "created", "expires", "last used", "state")
    for row in rows:
        has_expired = row.expires_at is not None and row.expires_at <= datetime.now(UTC)
        state = "revoked" if row.revoked_at else "expired" if has_expired else "usable"
        times = (row.created_at, row.expires_at, row.last_used_at)
        table.add_row(row.id, _plain(row.name), ", ".join(row.scopes), *map(_moment, times), state)
    return table


def _job_rows(item: Job, baseline: Trial | None) -> list[tuple[str, str]]:
    config = item.config
    return [
        ("job", item.id),
        ("recipe", f"{_plain(item.recipe)} {_json(item.params)}".rstrip()),
        ("state", f"{item.state} (attempt {item.attempt} of {item.max_attempts})"),
        ("search", f"{_json(config.model_dump(mode='json', exclude_defaults=True))}"),
        ("labels", _json(item.labels)),
        ("owner", _plain(item.owner)),
        ("created", _moment(item.created_at)),
        ("took", _took(item)),
        ("trials", f"{item.progress.trials} of at most {item.progress.max_trials}"),
        ("baseline", "" if item.baseline is None else text.number(item.baseline)),
        ("best", _best(item.best, baseline)),
        ("goal", _MET[item.goal_met]),
        ("quantized", "" if item.quantized_ops is None else f"{item.quantized_ops} ops"),
        ("stopped", item.stop_reason or ""),
        ("error", _plain(item.error or "")),
    ]


def _best(record: Mapping[str, Any] | None, baseline: Trial | None) -> str:
    if record is None:
        return ""
    trial = Trial.model_validate({**record, "plan": {}})
    shares = [
        f"{share} of FP32's {what}"
        for what, name in (("bops", "bops"), ("size", "size_bytes"))
        if (share := _share(trial, baseline, name))
    ]
    accuracy = _accuracy(trial.state, trial.accuracy)
    return ", ".join([f"trial {trial.number}", f"accuracy {accuracy}", *shares])


def _share(trial: Trial, baseline: Trial | None, cost: str) -> str:
    whole = None if baseline is None else baseline.costs.get(cost)
    part = trial.costs.get(cost)
    if part is None or not whole:
        return ""
    return f"{float(part) / float(whole):.2%}"


def _accuracy(state: str | None, value: float | str | None) -> str:
    return "failed" if state == "failed" or value is None else text.number(float(value))


def _parameter(item: tuple[str, Any]) -> str:
    name, schema = item
    return f"{name}={json.dumps(schema['default'])}" if "default" in schema else name


def _table(*headers: str) -> Table:
    """Return an empty table; columns whose header begins with > are aligned to the right."""
    table = Table(box=None, pad_edge=False)
    for header in headers:
        justify: Any = "right" if header.startswith(">") else "left"
        table.add_column(header.removeprefix(">"), justify=justify, overflow="fold")
    return table


def _plain(value: str) -> str:
    """Return a text in which nothing is markup, and nothing controls the terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in value)
    return escape(shown)


def _json(value: Mapping[str, Any]) -> str:
    return _plain(json.dumps(value, ensure_ascii=False)) if value else ""


def _moment(value: datetime | None) -> str:
    return "" if value is None else value.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _age(since: datetime) -> str:
    return text.seconds(max((datetime.now(UTC) - since).total_seconds(), 0.0))


def _took(item: Job) -> str:
    if item.started_at is None:
        return ""
    end = item.finished_at or datetime.now(UTC)
    return text.seconds(max((end - item.started_at).total_seconds(), 0.0))
