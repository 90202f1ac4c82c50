"""The commands `tuner export` and `tuner bench`."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tuner import recipes
from tuner.batches import read_batches
from tuner.cli_tasks import task_of
from tuner.errors import TunerError
from tuner.example import Example
from tuner.exporters.benchmark import BenchmarkRow, benchmark
from tuner.exporters.exporting import example_of
from tuner.exporters.targets import exporter, targets
from tuner.quantization import load
from tuner.quantized_model import QuantizedModel

_out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)

_RECIPE_HELP = f"Takes model and data from a recipe: {', '.join(recipes.names())}."
_TARGET_HELP = f"{', '.join(targets())}."
_RUNTIME_HELP = "onnxruntime, openvino, torch, torch-bf16."
_BF16 = "-bf16"
_Directory = Annotated[Path, typer.Argument(help="What QuantizedModel.save() wrote.")]
_Function = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODULE:FUNCTION]",
        help=(
            "A function that takes nothing and returns (model, calib_dataloader, eval_func): the "
            "FP32 architecture, with any weights. Or give --recipe."
        ),
    ),
]
_Batches = Annotated[
    list[int] | None, typer.Option("--batch", help="A batch size to time; several times for more.")
]


def export(
    directory: _Directory,
    function: _Function = None,
    recipe: Annotated[str | None, typer.Option(help=_RECIPE_HELP)] = None,
    target: Annotated[str, typer.Option(help=_TARGET_HELP)] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="File or folder to write; by default DIR/TARGET.")
    ] = None,
    batch: _Batches = None,
    evaluate: Annotated[
        bool,
        typer.Option(help="Run eval_func on the artifact and the simulation: two to four times."),
    ] = False,
    bf16: Annotated[
        bool,
        typer.Option(help="Compute products that stay float in bfloat16 (with --target torch)."),
    ] = False,
) -> None:
    """Write a saved model for a runtime, check it against the simulation and time it."""
    target = _lowered(target) if bf16 else target
    model, loader, eval_func = _restored(directory, function, recipe)
    report = model.export(
        directory / target if out is None else out,
        target=target,
        example_inputs=_first(model, loader),
        eval_func=eval_func if evaluate else None,
        batches=(1, 8) if batch is None else tuple(batch),
    )
    _out.print(report.summary(), markup=False)


def bench(
    directory: _Directory,
    function: _Function = None,
    recipe: Annotated[str | None, typer.Option(help=_RECIPE_HELP)] = None,
    target: Annotated[str, typer.Option(help=_RUNTIME_HELP)] = "onnxruntime",
    batch: _Batches = None,
) -> None:
    """Time a saved model: FP32 in torch, FP32 and quantized in the runtime, in turns.

    The runtime of target torch is its compiler, where there is one.
    """
    model, loader, _ = _restored(directory, function, recipe)
    example = _first(model, loader)
    rows = benchmark(model._parts.model, example, target, (1, 8) if batch is None else batch)
    _out.print(_bench_table(rows, target))


def _lowered(target: str) -> str:
    """Return the target that computes in bfloat16 what another computes in FP32."""
    known = targets()
    if target in known and not target.endswith(_BF16) and f"{target}{_BF16}" not in known:
        able = ", ".join(name.removesuffix(_BF16) for name in known if name.endswith(_BF16))
        raise TunerError(f"target {target!r} has no bfloat16: give --bf16 with --target {able}")
    return f"{target.removesuffix(_BF16)}{_BF16}"


def _restored(
    directory: Path, function: str | None, recipe: str | None
) -> tuple[QuantizedModel, Any, Any]:
    """Return a saved model, and the data and eval_func of its task."""
    if (function is None) == (recipe is None):
        raise TunerError(
            "a saved model needs its FP32 architecture and data: give MODULE:FUNCTION, a function "
            "that returns (model, calib_dataloader, eval_func), or --recipe"
        )
    model, loader, eval_func = task_of(function, recipe or "", _out)
    return load(directory, model), loader, eval_func


def _first(model: QuantizedModel, loader: Any) -> Example:
    """Return the call that the first batch of the calibration data makes."""
    return example_of(model._parts.model, next(iter(read_batches(loader, None))))


def _contenders(target: str) -> tuple[str, str, str]:
    if not target.startswith("torch"):
        return "FP32 torch, ms", f"FP32 {target}, ms", f"quantized {target}, ms"
    unquantized = "BF16" if target.endswith(_BF16) else "FP32"
    how = "op by op" if exporter(target).runtime.endswith("eager") else "compiled"
    return "FP32 eager, ms", f"{unquantized} {how}, ms", f"quantized {how}, ms"


def _bench_table(rows: Iterable[BenchmarkRow], target: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("batch", *_contenders(target), "quartiles", "speedup"):
        table.add_column(header, justify="right")
    for row in rows:
        mine = row.runtime_quantized
        times = (row.torch_float.median_ms, row.runtime_float.median_ms, mine.median_ms)
        table.add_row(
            str(row.batch),
            *(f"{time:.3g}" for time in times),
            f"{mine.lower_ms:.3g} to {mine.upper_ms:.3g}",
            f"{row.speedup:.2f}×",
        )
    return table
