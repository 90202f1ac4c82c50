"""tuner submit, jobs, job, trials, cancel, pause, resume, download, upload and recipes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from server.client import Client, NotFoundError
from server.client.waiting import has_ended
from server.commands import tables
from server.commands.job_ids import resolved
from server.commands.options import AsJson, JobId, Url
from server.commands.outcome import code_of, err, interruptible, reported
from server.schemas import Job, Trial
from server.states import State
from tuner.cli import parse_goal
from tuner.config import TuningConfig
from tuner.errors import TunerError

app = typer.Typer()

_RETRIES = 3


@app.command()
@reported
def submit(
    recipe: Annotated[str, typer.Argument(help="What to tune; `tuner recipes` lists them.")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="KEY=VALUE", help="A parameter of the recipe."),
    ] = None,
    goal: Annotated[
        str | None, typer.Option(help="The drop that is allowed: 1% of FP32, or 0.01.")
    ] = None,
    at_least: Annotated[float | None, typer.Option(help="The metric that must be kept.")] = None,
    lower_is_better: Annotated[bool, typer.Option(help="For losses and errors.")] = False,
    metric: Annotated[str | None, typer.Option(help="Which of several metrics counts.")] = None,
    space: Annotated[str | None, typer.Option(help="int8, mixed-int, fp8, mx, …")] = None,
    strategy: Annotated[str | None, typer.Option(help="auto, basic, random or tpe.")] = None,
    objective: Annotated[str | None, typer.Option(help="bops or size.")] = None,
    max_trials: Annotated[int | None, typer.Option(help="Evaluations beside FP32's.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds of the search.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the search.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A TuningConfig as JSON; the options above go before it."),
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher ones of an owner run first.")] = 0,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="To find the job by.")
    ] = None,
    max_attempts: Annotated[int, typer.Option(help="How many workers may die of it.")] = 3,
    job_timeout: Annotated[float | None, typer.Option(help="Seconds, then the job fails.")] = None,
    key: Annotated[
        str | None, typer.Option(help="An Idempotency-Key: the same one submits once only.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until the job has ended.")] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Submit a job and print its id.

    With --wait the exit code tells how it ended: 0 well, 1 goal missed, 3 failed, 4 cancelled.
    """
    options: dict[str, Any] = {"space": space, "strategy": strategy, "objective": objective}
    options |= {"max_trials": max_trials, "timeout_s": timeout, "seed": seed}
    if goal is not None or at_least is not None or lower_is_better or metric is not None:
        options["goal"] = parse_goal(goal or "1%", at_least, lower_is_better, metric).model_dump()
    with _client(url) as client:
        job = client.submit(
            recipe,
            {name: _value(text) for name, text in _pairs(param)},
            _config(config, options),
            priority=priority,
            labels=dict(_pairs(label)),
            max_attempts=max_attempts,
            timeout_s=job_timeout,
            idempotency_key=key,
        )
        if not wait:
            _show(job, as_json, job.id)
            return
        err.print(f"job {job.id}")
        with interruptible(job.id):
            job = client.wait(job.id, progress=None if not as_json else False)
        _show_whole(client, job, as_json)
    raise typer.Exit(code_of(job))


@app.command()
@reported
def jobs(
    state: Annotated[list[State] | None, typer.Option(help="May be given several times.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Of this recipe only.")] = None,
    owner: Annotated[str | None, typer.Option(help="Of this owner only.")] = None,
    label: Annotated[str | None, typer.Option(metavar="KEY=VALUE", help="With this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """List jobs, the newest first."""
    wanted = None if label is None else ":".join(_pairs([label])[0])
    with _client(url) as client:
        states = [str(one) for one in state or ()] or None
        found = client.jobs(state=states, recipe=recipe, owner=owner, label=wanted)
        items = [job for job, _ in zip(found, range(limit), strict=False)]
    if as_json:
        tables.show_json(items)
    elif items:
        tables.out.print(tables.jobs(items))
    else:
        err.print("There are no such jobs.")


@app.command()
@reported
def job(
    job_id: JobId,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show what happens until it ends.")
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Show a job. With --watch the exit code tells how it ended, as with submit --wait."""
    with _client(url) as client:
        item = resolved(client, job_id)
        if watch:
            with interruptible(item.id):
                _watch(client, item.id, as_json)
            item = client.job(item.id)
        _show_whole(client, item, as_json)
    if watch:
        raise typer.Exit(code_of(item))


@app.command()
@reported
def trials(job_id: JobId, as_json: AsJson = False, url: Url = None) -> None:
    """List the trials of a job; the best one is bold."""
    with _client(url) as client:
        item = resolved(client, job_id)
        found = client.trials(item.id)
        if as_json:
            tables.show_json(found)
            return
        baseline = _baseline(client, item)
        rows = [*([] if baseline is None else [baseline]), *found]
    best = None if item.best is None else item.best.get("number")
    tables.out.print(tables.trials(rows, best))


@app.command()
@reported
def cancel(job_id: JobId, as_json: AsJson = False, url: Url = None) -> None:
    """Cancel a job: at once where it waits, within a batch of its evaluation where it runs."""
    with _client(url) as client:
        item = client.cancel(resolved(client, job_id).id)
    _show(item, as_json, f"{item.id} {item.state}")


@app.command()
@reported
def pause(job_id: JobId, as_json: AsJson = False, url: Url = None) -> None:
    """Pause a job after the trial that runs."""
    with _client(url) as client:
        item = client.pause(resolved(client, job_id).id)
    _show(item, as_json, f"{item.id} {item.state}")


@app.command()
@reported
def resume(job_id: JobId, as_json: AsJson = False, url: Url = None) -> None:
    """Let a paused job go on from its stored trials."""
    with _client(url) as client:
        item = client.resume(resolved(client, job_id).id)
    _show(item, as_json, f"{item.id} {item.state}")


@app.command()
@reported
def download(
    job_id: JobId,
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="By default output/<id>.")
    ] = None,
    url: Url = None,
) -> None:
    """Fetch the files of a job: the quantized model, its result and its report."""
    with _client(url) as client:
        item = resolved(client, job_id)
        paths = client.download(item.id, directory or Path("output") / item.id)
    if not paths:
        err.print(f"Job {item.id} is {item.state} and has left no files.")
    for path in paths:
        tables.out.print(str(path), markup=False, soft_wrap=True)


@app.command()
@reported
def upload(
    file: Annotated[Path, typer.Argument(help="A .safetensors or .npz file.")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Send weights or data; a recipe's parameters name them by the id that is printed."""
    with _client(url) as client:
        asset = client.upload(file)
    if as_json:
        tables.show_json([asset])
    else:
        tables.out.print(asset.id, markup=False, soft_wrap=True)


@app.command()
@reported
def recipes(as_json: AsJson = False, url: Url = None) -> None:
    """List what jobs can be made of."""
    with _client(url) as client:
        items = client.recipes()
    if as_json:
        tables.show_json(items)
    else:
        tables.out.print(tables.recipes(items))


def _client(url: str | None) -> Client:
    return Client(url, retries=_RETRIES)


def _config(path: Path | None, options: dict[str, Any]) -> TuningConfig:
    try:
        given = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TunerError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(given, dict):
        raise TunerError(f"{path} holds no TuningConfig: give a JSON object")
    known = {name: value for name, value in options.items() if value is not None}
    return TuningConfig.model_validate({**given, **known})


def _pairs(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise TunerError(f"{text!r} has no name and value: give KEY=VALUE")
        pairs.append((name, value))
    return pairs


def _value(text: str) -> Any:
    """Read a parameter as JSON, and as text where it is none: 3, true, [1, 2], abc."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _watch(client: Client, job_id: str, as_json: bool) -> None:
    for event in client.events(job_id):
        if not as_json:
            tables.out.print(tables.event(event), soft_wrap=True)


def _show(item: Job, as_json: bool, line: str) -> None:
    if as_json:
        tables.show_json([item])
    else:
        tables.out.print(line, markup=False, soft_wrap=True)


def _show_whole(client: Client, item: Job, as_json: bool) -> None:
    if as_json:
        tables.show_json([item])
        return
    tables.out.print(tables.job(item, _baseline(client, item)))
    if not has_ended(item):
        err.print(f"Watch it: tuner job {item.id} --watch", soft_wrap=True)


def _baseline(client: Client, item: Job) -> Trial | None:
    if item.baseline is None:
        return None
    try:
        return client.trial(item.id, 0)
    except NotFoundError:
        return None
