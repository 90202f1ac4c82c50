"""From a quantized model to an artifact of a target, checked and measured."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.biases import bias_problem
from tuner.errors import ExportError, TunerError, brief
from tuner.evaluation import EvalFunc, Evaluator
from tuner.example import Axes, Example
from tuner.exporters.agreement import Run
from tuner.exporters.artifact import artifact_model
from tuner.exporters.base import Exporter, ExportRequest
from tuner.exporters.batch_sizes import checked_sizes
from tuner.exporters.metric import with_metric_floor
from tuner.exporters.probes import faithful_trace, named
from tuner.exporters.report import ExportReport
from tuner.exporters.staging import staged
from tuner.exporters.targets import exporter
from tuner.exporters.tracing import ONE_AT_A_TIME, Traced
from tuner.isolation import isolated_random_state
from tuner.model import InstrumentedModel
from tuner.plan import Plan
from tuner.saved_files import SAVED_FILES
from tuner.schemes import TensorScheme
from tuner.tensors import tensors_in

_OF_ANY_TYPE = ("calibration",)
"""Targets that only describe a model."""

_SUFFIXES = {".onnx", ".pt2", ".xml"}
"""Of files that a path may mean, though a target writes another."""


def export_model(
    model: InstrumentedModel,
    plan: Plan,
    path: str | Path,
    target: str,
    example: Example | None,
    dynamic_axes: Axes | None = None,
    batches: tuple[int, ...] = (1, 8),
    eval_func: EvalFunc | None = None,
    metric: str | None = None,
) -> ExportReport:
    """Export a model with a plan on it; nothing of it changes.

    Files come to `path` when all checks are done, `eval_func` among them: after an error, Ctrl-C or
    a kill, what was there before is still there. Exports in several threads wait for one another.

    Raises UnknownNameError for an unknown target, ExportError for all that cannot be done.
    """
    found = exporter(target)
    place = _path_of(path, found)
    if eval_func is not None and not callable(eval_func):
        raise ExportError(f"eval_func is a {type(eval_func).__name__}: give a function of a model")
    if example is None:
        raise ExportError(
            "a model that was loaded knows no inputs (they are the user's data, and not saved): "
            "give example_inputs, a batch as the calibration data have it"
        )
    if target not in _OF_ANY_TYPE:
        _refuse_other_types(model)
    sizes = checked_sizes(batches, example)
    is_file = place.suffix == found.suffix
    names = () if is_file else found.names
    _check_saved(place, names)
    with (
        ONE_AT_A_TIME,
        staged(place, is_file, names) as stage,
        isolated_random_state() as random_state,
    ):
        traced = faithful_trace(model, example, dynamic_axes)
        request = ExportRequest(
            traced=traced,
            plan=plan,
            ops=dict(model.ops),
            path=stage.path,
            batches=_sizes(traced, sizes),
        )
        if eval_func is None:
            report = found.export(request)
        else:
            evaluate = Evaluator(eval_func, metric, random_state)
            asking = replace(request, evaluate=_of_artifact(model, example, evaluate))
            report = with_metric_floor(found.export(asking), model, evaluate)
        files = stage.keep(report.files)
    runtime = found if found.checked_by is None else exporter(found.checked_by)
    fixed = () if dynamic_axes is not None else tuple(_fixed_axes(traced))
    notes = (*report.notes, *fixed, *_rounded_otherwise(runtime, model, plan))
    return replace(report, files=files, notes=notes)


def _of_artifact(
    model: InstrumentedModel, example: Example, evaluate: Evaluator
) -> Callable[[Run], float]:
    """Return what gives the metric of an artifact."""
    return lambda run: evaluate(artifact_model(model, example, run)).accuracy


def check_model(found: Exporter, model: InstrumentedModel, example: Example) -> None:
    """Raise ExportError where a target cannot run a model at all, before hours go into a plan."""
    if found.target not in _OF_ANY_TYPE:
        _refuse_other_types(model)
    with ONE_AT_A_TIME, isolated_random_state():
        traced = faithful_trace(model, example)
        try:
            found.check(traced)
        except ExportError as error:
            raise ExportError(
                f"target {found.target!r} cannot run this model, quantized or not: {error}"
            ) from error


def _refuse_other_types(model: InstrumentedModel) -> None:
    """Raise ExportError where parameters are not fp32: runtimes' quantizers take nothing else."""
    for name, parameter in model.model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ExportError(
                f"parameter {name!r} is {str(parameter.dtype).removeprefix('torch.')}: quantized "
                "models are exported from float32. Convert the model before it is tuned, "
                "quantization.fit(model.float(), …), or load what was saved into such a model"
            )


def _sizes(traced: Traced, batches: tuple[int, ...]) -> tuple[int, ...]:
    """Return the batch sizes that the model can be run at; its own where it has no other."""
    now = traced.example.batch
    held = [name for name, t in named(traced.example) if t.dim() and len(t) == now]
    if all(0 in traced.dynamic.get(name, {}) for name in held):
        return batches
    return (now,) if batches else ()


def _fixed_axes(traced: Traced) -> Iterator[str]:
    """Say which axes are free by default, but not in this model."""
    wanted = traced.example.dynamic_axes()
    for name, tensor in named(traced.example):
        for axis, label in wanted.get(name, {}).items():
            if axis not in traced.dynamic.get(name, {}):
                yield (
                    f"Axis {axis} ({label}) of {name} is fixed at {tensor.shape[axis]}: the model "
                    "computes with it as a constant (len(t) and int(…) make one, t.shape does "
                    "not), or otherwise at another length"
                )


def _rounded_otherwise(found: Exporter, model: InstrumentedModel, plan: Plan) -> Iterator[str]:
    """Say what the target's kernels round that the plan does not say, or the other way round."""
    shapes = {name: tuple(p.shape) for name, p in model.model.named_parameters()}
    counted = TensorScheme(format="int32")
    biases = sums = 0
    for name, op in model.ops.items():
        config = plan.get(name)
        if config is None:
            continue
        with_bias = config.model_copy(update={"bias": counted})
        is_one = op.type.rstrip("123d") in found.rounds_biases and config.bias is None
        biases += is_one and bias_problem(op, with_bias, shapes) is None
        is_sum = op.type == "add" and None not in map(config.input_scheme, op.activations)
        sums += is_sum and found.adds_before_rounding
    tuned = f"a plan that is tuned with target={found.target!r} agrees better"
    if biases:
        yield (
            f"{found.target} rounds {biases} biases to steps of input scale × weight scale, which "
            f"are float in the plan: {tuned}, or one with OpConfig(bias=…) of the format int32"
        )
    if sums:
        yield (
            f"{found.target} may round the result of {sums} sums alone, where the plan rounds what "
            f"is added, too: {tuned}"
        )


def example_of(model: InstrumentedModel, inputs: Any) -> Example:
    """Return the call that a batch makes of the model: a tensor, a tuple of inputs, a mapping."""
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, (list, tuple)):
        inputs = tuple(inputs)
    elif not isinstance(inputs, Mapping) and not isinstance(inputs, Tensor):
        raise ExportError(
            f"example_inputs is a {type(inputs).__name__}: give a tensor, a tuple of inputs or a "
            "mapping of them by name"
        )
    _check_values(inputs)
    try:
        return Example.of_batch(model.model, inputs)
    except TunerError:
        raise
    except Exception as error:  # the user's model may raise anything
        shown = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors_in(inputs))
        raise ExportError(
            f"the model refuses example_inputs ({shown}): {brief(error)}. Give a "
            "batch as the calibration data have it"
        ) from error


def _check_values(inputs: Any) -> None:
    """Refuse inputs that an artifact cannot be compared on."""
    tensors = list(tensors_in(inputs))
    if not any(tensor.numel() for tensor in tensors):
        raise ExportError(
            "example_inputs has no tensor with elements: the artifact is compared with the "
            "simulation on it. Give a batch as the calibration data have it"
        )
    if any(tensor.layout != torch.strided for tensor in tensors):
        raise ExportError("example_inputs has a sparse tensor: give dense ones, x.to_dense()")
    if any(tensor.is_meta or tensor.isnan().any() for tensor in tensors):
        raise ExportError(
            "example_inputs has NaN or no data: the artifact is compared with the simulation on it"
        )


def _check_saved(folder: Path, names: Iterable[str]) -> None:
    """Raise ExportError where files in a folder are those of a saved model, and would be lost."""
    taken = sorted(set(names) & set(SAVED_FILES))
    if taken and all((folder / name).is_file() for name in SAVED_FILES):
        raise ExportError(
            f"{str(folder)!r} holds a saved model, whose {taken[0]} the export would replace: "
            "give another folder"
        )


def _path_of(path: str | Path, found: Exporter) -> Path:
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise ExportError(f"path is {path!r}: give the path of a file or folder")
    place = Path(path)
    is_other = found.suffix is not None and place.suffix in _SUFFIXES - {found.suffix}
    if is_other and not place.is_dir():
        raise ExportError(
            f"path is {str(path)!r}, but target {found.target!r} writes {found.suffix} files: give "
            "the path of one, or of a folder"
        )
    return place
