"""The `tuner` command. Other packages add commands by the entry-point group `tuner.commands`."""

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, cast

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from tuner import recipes
from tuner.allocator import keep_freed_memory
from tuner.cli_export import bench, export
from tuner.cli_tasks import parts_of, task_of
from tuner.config import SearchSpace, TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.errors import SaveError, TunerError
from tuner.op_table import op_table_rich
from tuner.quantization import fit as fit_model
from tuner.quantization import load
from tuner.quantization import sweep as sweep_model
from tuner.quantized_model import QuantizedModel
from tuner.report.files import write_whole
from tuner.results import TuningResult
from tuner.saving import read_result
from tuner.sweep import FORMATS, SweepResult
from tuner.sweep_entries import PARTS, Part
from tuner.version import VERSION

app = typer.Typer(
    name="tuner",
    help="Find the cheapest quantized model that still meets your accuracy goal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
_err = Console(stderr=True, highlight=False)

MISSED_GOAL = 1
BAD_INPUT = 2


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Find the cheapest quantized model that still meets your accuracy goal."""
    if version:
        _out.print(VERSION)
        raise typer.Exit


@app.command()
def demo(
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(recipes.names())}.")] = (
        "digits-resnet"
    ),
    space: Annotated[str, typer.Option(help="The preset to choose from.")] = "mixed-int",
    goal: Annotated[str, typer.Option(help="The drop that is allowed: 1% or 0.01.")] = "1%",
    out: Annotated[Path, typer.Option(help="Where the result is saved.")] = Path("output/demo"),
) -> None:
    """Tune a CNN trained on handwritten digits; save the result and load it again."""
    _out.print(f"[bold]Recipe {recipe}[/]: training, or loading the weights of the last time …")
    task = recipes.get(recipe).task()
    _out.print(task.description)
    config = TuningConfig(goal=parse_goal(goal), space=space)
    model = fit_model(task.model, task.calib_dataloader, task.eval_func, config)
    _show(model.result)
    _save(model, out)
    again = load(out, recipes.get(recipe).task().model)
    scores = task.eval_func(model.model), task.eval_func(again.model)
    equal = "the same" if scores[0] == scores[1] else "NOT the same"
    _out.print(f"Loaded again from {out}: {task.metric} {scores[1]:.5g}, {equal} as before saving.")
    if scores[0] != scores[1]:
        raise typer.Exit(MISSED_GOAL)


@app.command()
def fit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help=(
                "A function that takes nothing and returns (model, calib_dataloader, eval_func)."
            ),
        ),
    ],
    goal: Annotated[
        str, typer.Option(help="The drop that is allowed: 1% of FP32, or 0.01.")
    ] = "1%",
    at_least: Annotated[float | None, typer.Option(help="The metric that must be kept.")] = None,
    lower_is_better: Annotated[bool, typer.Option(help="For losses and errors.")] = False,
    metric: Annotated[str | None, typer.Option(help="Which of several metrics counts.")] = None,
    space: Annotated[str, typer.Option(help="int8, int8-dynamic, int4-weight-only, mixed-int.")] = (
        "int8"
    ),
    repairs: Annotated[
        bool, typer.Option(help="Rescale, round and correct where that is predicted to help.")
    ] = True,
    strategy: Annotated[str, typer.Option(help="auto, basic, random or tpe.")] = "auto",
    objective: Annotated[
        str, typer.Option(help="bops, size, or latency: of the target, on this machine.")
    ] = "bops",
    runtime: Annotated[
        str | None,
        typer.Option("--target", help="Leave out what this target cannot run with real kernels."),
    ] = None,
    max_trials: Annotated[int, typer.Option(help="Evaluations beside the FP32 baseline.")] = 50,
    timeout: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Calibration samples to read.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="sqlite:///tuning.db or postgresql://…")
    ] = None,
    study_name: Annotated[str | None, typer.Option(help="Resumes the study of this name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Save the quantized model here.")] = None,
) -> None:
    """Tune your own model."""
    config = TuningConfig(
        goal=parse_goal(goal, at_least, lower_is_better, metric),
        space=space if repairs else SearchSpace(preset=space, repairs=()),
        strategy=strategy,
        objective=objective,
        max_trials=max_trials,
        timeout_s=timeout,
        calib_samples=calib_samples,
        seed=seed,
        target=runtime,
    )
    model, loader, eval_func = parts_of(target)
    tuned = fit_model(model, loader, eval_func, config, storage=storage, study_name=study_name)
    _show(tuned.result)
    if out is not None:
        _save(tuned, out)
    if tuned.result.goal_met is False:
        raise typer.Exit(MISSED_GOAL)


@app.command()
def sweep(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODULE:FUNCTION]",
            help=(
                "A function that takes nothing and returns (model, calib_dataloader, eval_func). "
                "Without it, the recipe is swept."
            ),
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(recipes.names())}.")] = (
        "digits-resnet"
    ),
    formats: Annotated[
        str, typer.Option(help="Number formats, with commas between: int8,e4m3fn,mxfp4.")
    ] = ",".join(FORMATS),
    part: Annotated[
        list[str] | None, typer.Option(help="weights, inputs or both; may be given several times.")
    ] = None,
    lower_is_better: Annotated[bool, typer.Option(help="For losses and errors.")] = False,
    metric: Annotated[str | None, typer.Option(help="Which of several metrics counts.")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Calibration samples to read.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write sweep.json, sweep.csv and sweep.svg here.")
    ] = None,
) -> None:
    """Show how a model withstands fewer bits: each format on weights, on inputs and on both."""
    if out is not None:
        _make_folder(out)
    result = sweep_model(
        *task_of(target, recipe, _out),
        [name.strip() for name in formats.split(",") if name.strip()],
        parts=PARTS if part is None else cast(list[Part], part),
        goal=AccuracyGoal(higher_is_better=not lower_is_better, metric=metric),
        calib_samples=calib_samples,
    )
    _out.print(result.summary(), markup=False)
    if out is not None:
        _write_sweep(result, out)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="What QuantizedModel.save() wrote.")],
    trials: Annotated[bool, typer.Option(help="Show the trials, too.")] = False,
) -> None:
    """Show a saved plan: op, type, shape, choice, predicted damage, share of cost."""
    result = read_result(directory)
    if trials:
        _out.print(_trial_table(result))
    _out.print(result.summary(), markup=False)
    _out.print()
    _out.print(op_table_rich(result.op_table))


def parse_goal(
    text: str,
    at_least: float | None = None,
    lower_is_better: bool = False,
    metric: str | None = None,
) -> AccuracyGoal:
    """Read "1%" as a relative drop, "0.01" as an absolute one."""
    relative = text.strip().endswith("%")
    try:
        drop = float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise TunerError(f"goal {text!r} is no drop: give 1% (of FP32) or 0.01") from error
    return AccuracyGoal(
        max_drop=drop / 100 if relative else drop,
        relative=relative,
        higher_is_better=not lower_is_better,
        metric=metric,
        at_least=at_least,
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{out} cannot be made: {error.strerror or error}") from error


def _write_sweep(result: SweepResult, out: Path) -> None:
    text = json.dumps(result.to_dict(), indent=2, allow_nan=False)
    write_whole("the result", out / "sweep.json", text)
    write_whole("the table", out / "sweep.csv", result.to_dataframe().to_csv(index=False))
    _out.print(f"Saved to {out}: sweep.json, sweep.csv; plot: {result.plot(out / 'sweep.svg')}")


def _show(result: TuningResult) -> None:
    _out.print(_trial_table(result))
    _out.print(op_table_rich(result.op_table))
    _out.print()
    _out.print(result.summary(), markup=False)


def _trial_table(result: TuningResult) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("trial", "accuracy", "goal", "bops", "size", "seconds", "why"):
        table.add_column(header, justify="left" if header in ("goal", "why") else "right")
    for record in (result.baseline_trial, *result.trials):
        mark = {True: "[green]met[/]", False: "[yellow]missed[/]", None: ""}[record.meets_goal]
        accuracy = "failed" if record.accuracy is None else f"{record.accuracy:.5g}"
        ratios = (result.cost_ratio(record, cost) for cost in ("bops", "size_bytes"))
        shares = ("" if ratio is None else f"{ratio:.2%}" for ratio in ratios)
        style = "bold" if record == result.best else ""
        row = (
            str(record.number),
            accuracy,
            mark,
            *shares,
            f"{record.duration_s:.2f}",
            record.reason,
        )
        table.add_row(*row, style=style)
    return table


def _save(model: QuantizedModel, out: Path) -> None:
    model.save(out)
    report = model.result.report(out / "report.html")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    _out.print(f"Saved to {out} ({size / 1024:.0f} KiB of weights); report: {report}")


app.command()(export)
app.command()(bench)


def run() -> None:
    """Run the command line; errors of the tuner are shown without a traceback."""
    for point in entry_points(group="tuner.commands"):
        app.add_typer(point.load())  # with a name of its own it is a group, without one it is not
    keep_freed_memory()
    try:
        app()
    except (TunerError, ValidationError) as error:
        _err.print(f"[red bold]error:[/] {type(error).__name__}", end=" ")
        _err.print(str(error), markup=False)
        sys.exit(BAD_INPUT)
