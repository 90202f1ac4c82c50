"""How long one op takes in a runtime under each of its options, measured alone and kept on disk."""

import copy
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner import formats
from tuner.errors import ExportError
from tuner.example import Example
from tuner.exporters.base import Exporter
from tuner.exporters.timing import undisturbed_ms
from tuner.exporters.tracing import trace
from tuner.kernels.build import processor
from tuner.model import InstrumentedModel
from tuner.ops import Op
from tuner.ranges import QParams, symmetric_zero_point
from tuner.saved_files import cache_folder
from tuner.schemes import OpConfig, TensorScheme
from tuner.version import VERSION

_log = logging.getLogger(__name__)
_LIMIT_S = 1.5
_SEED = 0
_FLOAT = OpConfig.float()
_CODE_BITS, _NARROW_BITS = 8, 7
_MOST_OPERANDS = 4
_ATTENTION = "scaled_dot_product_attention"


class OpTimes:
    """Times of ops in one runtime on this machine, in milliseconds; measured once a signature.

    They are kept in the user's cache folder: another processor, another version of the runtime and
    another number of threads each have a file of their own.
    """

    def __init__(self, exporter: Exporter, folder: Path | None = None) -> None:
        self._exporter = exporter
        threads = torch.get_num_threads()
        machine = hashlib.sha256(processor().encode()).hexdigest()[:8]
        name = f"{exporter.runtime}-{machine}-{threads}-threads.json".replace(" ", "-")
        self._path = (cache_folder() / "op_times" if folder is None else folder) / name
        self._known: dict[str, float] = _read(self._path)
        self._refused: set[str] = set()

    def time_ms(self, model: InstrumentedModel, op: Op, config: OpConfig) -> float:
        """Return the time of an op under a configuration; 0 for what cannot be measured alone.

        Where that can be in FP32 only, it is FP32's. No plan may be on the model.
        """
        signature, plain = (_signature(model, op, each) for each in (config, _FLOAT))
        if signature is None or plain in self._refused:
            return 0.0
        if signature not in self._known and signature not in self._refused:
            self._measure(signature, model, op, config)
        if signature in self._refused:
            return 0.0 if config.is_float else self.time_ms(model, op, _FLOAT)
        return self._known[signature]

    def _measure(self, signature: str, model: InstrumentedModel, op: Op, config: OpConfig) -> None:
        try:
            self._known[signature] = self._measured(model, op, config)
        except ExportError as error:  # of other shapes than a model has: only its time is missing
            _log.info("%s cannot be timed alone: %s", op.name, error)
            self._refused.add(signature)
        else:
            self._known = _read(self._path) | self._known  # others may have measured meanwhile
            _write(self._path, self._known)

    def _measured(self, model: InstrumentedModel, op: Op, config: OpConfig) -> float:
        micro = _micro_model(model, op)
        assert micro is not None
        chains = op.type.startswith("Conv")  # what is beside a convolution takes and gives codes
        call = _compiled(self._exporter, micro, op, config, chains)
        return undisturbed_ms(call, _LIMIT_S)


def can_measure(op: Op) -> bool:
    """Whether an op can be run alone: layers, and products of two activations."""
    return _is_product(op) or _is_layer(op)


def _is_product(op: Op) -> bool:
    if op.type not in _FUNCTIONS:
        return False
    _, positions = _FUNCTIONS[op.type]
    if not set(positions) <= set(op.activations):
        return False
    query, key = (op.input_shapes[op.activations.index(i)] for i in positions[:2])
    # fewer heads of keys than of queries take an argument that is not recorded
    return op.type != _ATTENTION or query[:-2] == key[:-2]


def _is_layer(op: Op) -> bool:
    return op.type.startswith(("Linear", "Conv")) and bool(op.input_shapes)


class _Product(nn.Module):
    """One functional op of activations."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *operands: Tensor) -> Tensor:
        return self._function(*operands)


_FUNCTIONS: Mapping[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "matmul": (torch.matmul, (0, 1)),
    "bmm": (torch.bmm, (0, 1)),
    # the third operand is made inside: the probabilities
    _ATTENTION: (F.scaled_dot_product_attention, (0, 1, 3)),
}


def _micro_model(model: InstrumentedModel, op: Op) -> tuple[nn.Module, tuple[Tensor, ...]] | None:
    """Return a model of this op alone, and inputs of the shapes that were recorded."""
    generator = torch.Generator().manual_seed(_SEED)
    if op.type in _FUNCTIONS:
        function, positions = _FUNCTIONS[op.type]
        shapes = [op.input_shapes[op.activations.index(i)] for i in positions]
        inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        return _Product(function), inputs
    if not _is_layer(op):
        return None
    inputs = (torch.randn(op.input_shapes[0], generator=generator),)
    layer = _layer(model, op)
    return None if layer is None else (nn.Sequential(OrderedDict(op=layer)), inputs)


def _layer(model: InstrumentedModel, op: Op) -> nn.Module | None:
    if op.name in model.candidates and "/" not in op.name:
        return copy.deepcopy(model.model.get_submodule(op.name))
    if op.type == "Linear":  # of nn.MultiheadAttention, or a functional call
        return nn.Linear(op.input_shapes[0][-1], op.output_shape[-1])
    return None


class _UnitRanges:
    """Ranges of normally distributed inputs: the time does not depend on the values."""

    def qparams(self, op: str, operand: int, scheme: TensorScheme) -> QParams:
        """Return a scale that spans ±4 at the scheme's number of codes."""
        low, high = scheme.quant_range
        middle = symmetric_zero_point(scheme) if scheme.symmetric else (low + high + 1) // 2
        zero_point = torch.tensor(middle, dtype=torch.int32)
        return QParams(torch.tensor(8.0 / (high - low)), zero_point if middle else None)


def _compiled(
    exporter: Exporter,
    micro: tuple[nn.Module, tuple[Tensor, ...]],
    op: Op,
    config: OpConfig,
    chains: bool,
) -> Callable[[], object]:
    module, inputs = micro
    instrumented = InstrumentedModel(module.eval())
    with torch.no_grad():
        graph = instrumented.record(lambda: module(*inputs), len(inputs[0]))
    (alone,) = (found for found in graph.ops.values() if found.type == op.type)
    instrumented.install(graph.ops, _UnitRanges())
    scheme = config.input_scheme(0) if op.activations else None
    on_codes = chains and scheme is not None and not scheme.is_dynamic
    plain = config.model_copy(update={"recovery": (), "bias": None})
    if on_codes:
        plain = plain.model_copy(update={"output": scheme})
    instrumented.apply({} if config.is_float else {alone.name: plain})
    traced = trace(instrumented, Example.of_call(module, inputs, {}))
    return exporter.compiled_alone(traced, on_codes)


def _signature(model: InstrumentedModel, op: Op, config: OpConfig) -> str | None:
    """Return what the time of an op depends on, None for what is not measured."""
    if not can_measure(op):
        return None
    layer = None
    if _is_layer(op):
        layer = _layer(model, op)
        if layer is None:
            return None
    shapes = [list(shape) for shape in op.input_shapes]
    facts = [VERSION, op.type, shapes, str(layer), _kernel(config)]
    return json.dumps(facts)


def _kernel(config: OpConfig) -> list[Any]:
    """Return what of a configuration its kernel depends on.

    Kernels read codes of fewer bits as codes of 8, and weights beside them, too: 8 bits differ from
    these only because sums of products may then overflow, which other kernels do not let happen.
    """
    inputs = [config.input_scheme(index) for index in range(_MOST_OPERANDS)]
    on_codes = any(scheme is not None for scheme in inputs)
    weight = _stored(config.weight, _NARROW_BITS if on_codes else 0)
    return [weight, *(_stored(scheme, _CODE_BITS) for scheme in inputs)]


def _stored(scheme: TensorScheme | None, least_bits: int) -> list[Any] | None:
    """Return how a tensor is stored, integers with so many bits at least."""
    if scheme is None:
        return None
    found, name = formats.get(scheme.format), scheme.format
    if found.kind == "int" and found.block is None:
        bits = max(found.bits - scheme.reduce_range, least_bits)
        name = f"{'int' if found.signed else 'uint'}{bits}"
    return [name, scheme.granularity.model_dump(), scheme.is_dynamic, scheme.symmetric]


def _read(path: Path) -> dict[str, float]:
    try:
        known = json.loads(path.read_text())
        return {str(name): float(value) for name, value in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, known: Mapping[str, float]) -> None:
    """Keep the times; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(known, indent=0))
        part.replace(path)
    except OSError as error:
        _log.info("times of ops cannot be kept in %s: %s", path, error)
