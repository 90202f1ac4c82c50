"""A quantized model on disk: plan, packed weights, configuration and result; no pickle."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tuner.costs import named_storage
from tuner.errors import PlanError, SaveError
from tuner.example import Example
from tuner.isolation import copied
from tuner.model import InstrumentedModel
from tuner.operands import static_operands
from tuner.ops import Op, Product, WeightRef
from tuner.packed_tensor import (
    PART_NAMES,
    StoredTensor,
    check_parts,
    unpack_tensor,
)
from tuner.plan import Plan
from tuner.ranges import QParams
from tuner.recovery.folding import FoldedPair, folded_names, prepare
from tuner.recovery.scaling import Scaling, prepare_caps
from tuner.results import TuningResult
from tuner.saved_files import (
    SAVED_FILES,
    as_json,
    checked,
    checksums,
    read_json,
    read_sealed,
    sealed,
    write_files,
)
from tuner.saved_formats import check_formats, definitions
from tuner.schemes import OpConfig, TensorScheme
from tuner.version import VERSION

_LAYOUT = 1
_WEIGHTS, _PLAN, _CONFIG, _RESULT = SAVED_FILES
_INTEGER = "graph.json"  # beside weights of the same name: what export(target="integer") writes
_SCALES, _ZERO_POINTS = "activations.scale", "activations.zero_point"


@dataclass(frozen=True, eq=False)
class Parts:
    """What a saved directory holds, in memory; `example` is not saved: it is the user's data."""

    model: InstrumentedModel
    plan: Plan
    folded: tuple[FoldedPair, ...]
    result: TuningResult
    scalings: tuple[Scaling, ...] = ()
    example: Example | None = None


def save_parts(parts: Parts, directory: str | Path) -> Path:
    """Write a directory, all of it or nothing; raises SaveError where it cannot."""
    target = _folder(directory)
    if (target / _INTEGER).exists() and not (target / _CONFIG).exists():
        raise SaveError(
            f"{str(target)!r} holds an export for target 'integer', whose {_WEIGHTS} would be "
            "replaced: give another folder"
        )
    tensors, activations = _tensors(parts)
    files = {
        _WEIGHTS: save(tensors, {"accutune_layout": str(_LAYOUT)}),
        _RESULT: as_json(parts.result.to_dict()),
        _PLAN: parts.plan.to_json(indent=1).encode(),
    }
    files[_CONFIG] = sealed(_config(parts, activations, files))
    try:
        write_files(files, target)
    except OSError as error:
        raise SaveError(
            f"cannot save to {str(target)!r}: {error.strerror or error}. Choose a folder that can "
            "be written, with room left on the disk"
        ) from error
    return target


def load_parts(directory: str | Path, model: nn.Module) -> Parts:
    """Read a saved directory into a copy of `model`, the FP32 architecture with any weights.

    Raises SaveError for a missing, truncated or altered file, PlanError for another architecture.
    """
    source = _folder(directory)
    config = read_json(source, _CONFIG)
    missing = {"folded", "ops", "weights", "activations", "sha256"} - set(config)
    if missing:
        raise SaveError(f"{source / _CONFIG} is damaged: it lacks {', '.join(sorted(missing))}")
    if config.get("layout") != _LAYOUT:
        raise SaveError(
            f"{source / _CONFIG}: layout {config.get('layout')!r}, this reads {_LAYOUT}"
        )
    config = read_sealed(source, _CONFIG)
    contents = {
        name: checked(source, name, config["sha256"]) for name in (_WEIGHTS, _PLAN, _RESULT)
    }
    try:
        tensors = load(contents[_WEIGHTS])
    except SafetensorError as error:
        raise SaveError(f"{source / _WEIGHTS} is damaged: {error}") from error
    for name in (_PLAN, _RESULT):
        check_formats(json.loads(contents[name]), config.get("formats", {}))
    plan = Plan.from_json(contents[_PLAN].decode())
    result = TuningResult.from_dict(json.loads(contents[_RESULT]))
    folded = tuple(FoldedPair(**pair) for pair in config["folded"])
    twin = copied(model)
    prepare(twin, folded)
    scalings = tuple(map(Scaling.from_dict, config.get("scalings", ())))
    prepare_caps(twin, scalings)
    instrumented = InstrumentedModel(twin)
    ops = {entry["name"]: _op(entry) for entry in config["ops"]}
    _restore(instrumented, ops, plan, folded, tensors, config["weights"])
    instrumented.install(ops, SavedRanges(config["activations"], tensors))
    for name in plan:
        instrumented.corrections.adopt(ops[name], plan[name])
    for op in _biased(ops, plan):
        parts = _parts_of(instrumented.biases.path(op), tensors)
        instrumented.biases.adopt(op, plan[op.name], parts, instrumented.bias_scale)
    instrumented.apply(plan)
    return Parts(instrumented, plan, folded, result, scalings)


def read_result(directory: str | Path) -> TuningResult:
    """Read the result of a saved directory; raises SaveError where it is damaged."""
    source = _folder(directory)
    contents = checked(source, _RESULT, read_sealed(source, _CONFIG).get("sha256", {}))
    return TuningResult.from_dict(json.loads(contents))


def _folder(directory: object) -> Path:
    if not isinstance(directory, str | os.PathLike) or not str(directory):
        raise SaveError(f"directory is {directory!r}: give the path of a folder")
    return Path(directory)


class SavedRanges:
    """Quantization parameters of activations as they were saved."""

    def __init__(self, order: list[Any], tensors: Mapping[str, Tensor]) -> None:
        counts = [int(slices[0]) if slices else 1 for _, _, *slices in order]
        empty = torch.empty(0)
        stored = [tensors.get(name, empty) for name in (_SCALES, _ZERO_POINTS)]
        if any(len(values) != sum(counts) for values in stored):
            raise SaveError(
                f"{_CONFIG} is damaged: it speaks of {sum(counts)} scales of activations, and "
                f"{_WEIGHTS} holds {len(stored[0])}"
            )
        scales, zero_points = (values.split(counts) for values in stored)
        self._known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        for (op, index, *slices), scale, zero_point in zip(order, scales, zero_points, strict=True):
            found = (scale, zero_point) if slices else (scale[0], zero_point[0])
            self._known[str(op), int(index)] = found

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Return the saved parameters of an operand."""
        if (op, operand) not in self._known:
            raise PlanError(f"{op}: no range was saved for operand {operand} (calibrate again)")
        scale, zero_point = self._known[op, operand]
        has_one = not scheme.symmetric or bool((zero_point != 0).any())
        return QParams(scale, zero_point if has_one else None)


def _tensors(parts: Parts) -> tuple[dict[str, Tensor], list[tuple[int | str, ...]]]:
    """Return all tensors to write, and the order of the activations' parameters."""
    model = parts.model
    needless = folded_names(model.model, parts.folded)
    weights = _weight_schemes(model.ops, parts.plan)
    packed_paths = {ref.path for ref, _ in weights.values()}
    biased = _biased(model.ops, parts.plan)
    bias_paths = {model.biases.path(op) for op in biased}
    tensors = {
        name: tensor.detach().contiguous().cpu().clone()
        for name, tensor in named_storage(model.model).items()
        if name not in needless | packed_paths | bias_paths
    }
    for ref, _ in weights.values():
        tensors.update(_named(_stem(ref), model.weights.stored(ref)))
    for op in biased:
        tensors.update(_named(*model.biases.stored(op)))
    for path in packed_paths:
        tensors.update(_float_rows(path, model, weights))
    order, activations = _activations(parts)
    return tensors | activations, order


def _activations(parts: Parts) -> tuple[list[tuple[int | str, ...]], dict[str, Tensor]]:
    """Return the static parameters of activations one after the other, and what they are of.

    That is (operation, operand) per tensor, (operation, operand, slices) along an axis.
    """
    order: list[tuple[int | str, ...]] = []
    scales, zero_points = [], []
    for name, config in parts.plan.items():
        for index, scheme in static_operands(parts.model.ops[name], config):
            qparams = parts.model.qparams(name, index, scheme)
            assert qparams is not None
            scale = torch.as_tensor(qparams.scale).detach().cpu()
            zero = 0 if qparams.zero_point is None else qparams.zero_point
            zero_point = torch.as_tensor(zero, dtype=torch.int32).cpu()
            order.append((name, index, *scale.shape))
            scales.append(scale.reshape(-1))
            zero_points.append(zero_point.expand(scale.shape).reshape(-1))
    if not order:
        return order, {}
    return order, {_SCALES: torch.cat(_promoted(scales)), _ZERO_POINTS: torch.cat(zero_points)}


def _promoted(scales: list[Tensor]) -> list[Tensor]:
    """Give scales one dtype: float64 where a float64 model has one, else float32."""
    double = any(scale.dtype == torch.float64 for scale in scales)
    return [scale.double() if double else scale.float() for scale in scales]


def _weight_schemes(
    ops: Mapping[str, Op], plan: Mapping[str, OpConfig]
) -> dict[Any, tuple[WeightRef, TensorScheme]]:
    """Return every quantized weight once, tied ones under one key."""
    found = {}
    for name, config in plan.items():
        if config.weight is not None and name in ops:
            found.update({ref.key: (ref, config.weight) for ref in ops[name].weights})
    return found


def _roundings(ops: Mapping[str, Op], plan: Mapping[str, OpConfig]) -> dict[Any, str]:
    """Return how weights are rounded where that is not to nearest."""
    configs = ((ops[name], config.rounding) for name, config in plan.items() if name in ops)
    return {ref.key: rounding for op, rounding in configs if rounding for ref in op.weights}


def _biased(ops: Mapping[str, Op], plan: Mapping[str, OpConfig]) -> list[Op]:
    """Return the ops whose bias is quantized."""
    return [ops[n] for n, config in plan.items() if config.bias is not None and n in ops]


def _named(stem: str, parts: StoredTensor) -> dict[str, Tensor]:
    return {f"{stem}.{part}": tensor for part, tensor in parts.items()}


def _stem(ref: WeightRef) -> str:
    return ref.path if ref.rows is None else f"{ref.path}[{ref.rows[0]}:{ref.rows[1]}]"


def _parts_of(stem: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
    names = {part: f"{stem}.{part}" for part in PART_NAMES}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def _float_rows(
    path: str, model: InstrumentedModel, weights: Mapping[Any, tuple[WeightRef, TensorScheme]]
) -> dict[str, Tensor]:
    """Return the runs of rows of a partly quantized parameter that stay float."""
    taken = sorted(ref.rows for ref, _ in weights.values() if ref.path == path and ref.rows)
    if not taken:
        return {}
    parameter = dict(model.model.named_parameters())[path]
    edges = [0, *(edge for rows in taken for edge in rows), parameter.shape[0]]
    gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    rows = {f"{path}[{a}:{b}]": parameter[a:b].detach().cpu().clone() for a, b in gaps}
    return {name: tensor.contiguous() for name, tensor in rows.items()}


@torch.no_grad()
def _restore(
    model: InstrumentedModel,
    ops: Mapping[str, Op],
    plan: Plan,
    folded: tuple[FoldedPair, ...],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, list[int]],
) -> None:
    """Put the saved tensors on the model, after checking that they are for this architecture."""
    storage = named_storage(model.model)
    missing = [name for name in plan if name not in ops]
    weights = _weight_schemes(ops, plan)
    missing += [ref.path for ref, _ in weights.values() if ref.path not in storage]
    if missing:
        raise PlanError(
            f"the saved plan speaks of {missing[0]!r}, which this model lacks: it is a plan for "
            "another architecture"
        )
    covered = {ref.path for ref, _ in weights.values()} | folded_names(model.model, folded)
    for op in _biased(ops, plan):
        path = _bias_path(model, op)
        covered.add(path)
        _check_shape(path, storage[path], shapes)
    for name, target in storage.items():
        if name not in covered:
            _copy(name, target, tensors.get(name))
    for name, tensor in tensors.items():
        path, bracket, rows = name.partition("[")
        if bracket and rows.endswith("]"):
            start, stop = rows[:-1].split(":")
            _copy(name, storage[path][int(start) : int(stop)], tensor)
    rounded = _roundings(ops, plan)
    for ref, scheme in weights.values():
        target = ref.of(storage[ref.path])
        _check_shape(_stem(ref), target, shapes)
        packed = _parts_of(_stem(ref), tensors)
        check_parts(packed, scheme, _stem(ref))
        value = unpack_tensor(packed, scheme, tuple(target.shape), target.dtype)
        model.weights.adopt(ref, value, scheme, packed, rounded.get(ref.key))


def _bias_path(model: InstrumentedModel, op: Op) -> str:
    try:
        return model.biases.path(op)
    except AttributeError as error:
        raise PlanError(
            f"{op.name!r} has no bias in this model, and a quantized one was saved: it is a plan "
            "for another architecture"
        ) from error


def _check_shape(name: str, target: Tensor, shapes: Mapping[str, list[int]]) -> None:
    if list(target.shape) != shapes.get(name):
        raise PlanError(
            f"{name!r} has shape {list(target.shape)} in this model, and shape "
            f"{shapes.get(name)} was saved: it is a plan for another architecture"
        )


def _copy(name: str, target: Tensor, value: Tensor | None) -> None:
    if value is None or value.shape != target.shape:
        found = "nothing" if value is None else f"shape {list(value.shape)}"
        raise PlanError(
            f"{name!r} has shape {list(target.shape)} in this model, and {found} was saved for "
            "it: it is a plan for another architecture"
        )
    if value.dtype != target.dtype:
        raise PlanError(
            f"{name!r} is {_type(target)} in this model, and {_type(value)} was saved: load it "
            f"into a model of that type, model.to({value.dtype})"
        )
    target.copy_(value)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config(parts: Parts, activations: list[Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    best = parts.result.best
    return {
        "layout": _LAYOUT,
        "versions": {"accutune": VERSION, "torch": torch.__version__},
        "config": parts.result.config.model_dump(mode="json"),
        "metrics": {"accuracy": best.accuracy, **best.metrics},
        "costs": dict(best.costs),
        "folded": [asdict(pair) for pair in parts.folded],
        "scalings": [scaling.to_dict() for scaling in parts.scalings],
        "ops": [asdict(op) for op in parts.model.ops.values()],
        "weights": _shapes(parts),
        "activations": activations,
        "formats": definitions(json.loads(files[_PLAN])),
        "sha256": checksums(files),
    }


def _shapes(parts: Parts) -> dict[str, list[int]]:
    parameters = dict(parts.model.model.named_parameters())
    refs = (ref for ref, _ in _weight_schemes(parts.model.ops, parts.plan).values())
    shapes = {_stem(ref): list(ref.of(parameters[ref.path]).shape) for ref in refs}
    biased = map(parts.model.biases.path, _biased(parts.model.ops, parts.plan))
    return {**shapes, **{path: list(parameters[path].shape) for path in biased}}


def _op(entry: Mapping[str, Any]) -> Op:
    weights = (
        WeightRef(**{**ref, "rows": tuple(ref["rows"]) if ref["rows"] else None})
        for ref in entry["weights"]
    )
    return Op(
        **{
            **entry,
            "weights": tuple(weights),
            "activations": tuple(entry["activations"]),
            "products": tuple(Product(**product) for product in entry["products"]),
            "input_shapes": tuple(tuple(shape) for shape in entry["input_shapes"]),
            "output_shape": tuple(entry["output_shape"]),
        }
    )
