"""The target `calibration`: ranges and bits of every quantized tensor, as text for other tools."""

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx

from tuner import formats
from tuner.exporters.base import Exporter, ExportRequest
from tuner.exporters.markers import operand_of
from tuner.exporters.report import ExportReport
from tuner.exporters.staging import digest, written
from tuner.exporters.tracing import Traced, TracedWeight
from tuner.operands import OUTPUT
from tuner.ops import Op
from tuner.packed_tensor import stored_qparams, unpack_tensor
from tuner.plan import Plan
from tuner.qparams import whole_scale
from tuner.quantizer import Quantizer
from tuner.saved_files import as_json
from tuner.schemes import OpConfig, TensorScheme

RANGES, CACHE = "ranges.json", "calibration.cache"
_FORMAT, _VERSION = "accutune-calibration", 1
_INT8 = 127.0


@dataclass(frozen=True)
class TensorRange:
    """One quantized tensor: numbers where it has one scale, else one for each.

    `kind` is weight, input or output; `operand` the index of an input, else None. `tensor` is the
    node of the traced graph that the quantizer reads, or the parameter. Where a scale follows from
    the data, scale, zero point, min and max are None.
    """

    name: str
    op: str
    kind: str
    operand: int | None
    tensor: str
    format: str
    bits: int
    scale: float | list[float] | None
    zero_point: int | list[int] | None
    min: float | list[float] | None
    max: float | list[float] | None


class CalibrationExporter(Exporter):
    """Writes a folder of ranges.json and calibration.cache; nothing in it runs.

    ranges.json has `format`, `version`, `model_inputs`, `model_outputs`, `tensors`, a list of
    TensorRange, and `cache_sha256`, the digest of the cache of the same export. calibration.cache
    is TensorRT's text: the line TRT-<version>-EntropyCalibration2, then `name: scale` for each
    activation, the scale as eight hexadecimal digits of a big-endian IEEE-754 single. It is that of
    symmetric int8, max(|min|, |max|) / 127, whatever the bits of the plan. Names are those of the
    tensors in the traced graph; a file that TensorRT is to read with the cache may call some of
    them otherwise, which must be mapped. Where a tensor has several ranges the widest counts.
    TensorRT 10 takes a cache only with the number of its own version in the first line: give it as
    `tensorrt_version`.
    """

    target = "calibration"

    def __init__(self, tensorrt_version: int = 8601) -> None:
        self.tensorrt_version = tensorrt_version

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its two files."""
        return RANGES, CACHE

    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return None: every range can be written down."""
        return None

    def export(self, request: ExportRequest) -> ExportReport:
        """Write both files into the folder `request.path`; raises ExportError where it cannot."""
        ranges = [*weight_ranges(request.traced), *activation_ranges(request.traced)]
        cache = cache_text(ranges, self.tensorrt_version).encode()
        files = {RANGES: _json(request.traced, ranges, digest(cache)), CACHE: cache}
        return ExportReport(
            target=self.target,
            files=written(files, request.path),
            size_bytes=sum(map(len, files.values())),
            float_size_bytes=None,
            agreement=None,
            notes=_notes(ranges, request.plan),
        )


def weight_ranges(traced: Traced) -> Iterator[TensorRange]:
    """Yield the ranges of the quantized weights, tied ones once for each op."""
    for weight in traced.weights:
        rows = "" if weight.ref.rows is None else f"[{weight.ref.rows[0]}:{weight.ref.rows[1]}]"
        tensor = f"{weight.ref.path}{rows}"
        for op in weight.ops:
            yield TensorRange(
                f"{op}.weight" if op else "weight",
                op,
                "weight",
                None,
                tensor,
                weight.scheme.format,
                weight.scheme.bits,
                *_weight_numbers(weight),
            )


def activation_ranges(traced: Traced) -> Iterator[TensorRange]:
    """Yield the ranges of quantized inputs and outputs, each once."""
    seen: set[str] = set()
    for node, key in traced.markers():
        source = node.args[0]
        assert isinstance(source, fx.Node)
        tensor = _tensor_name(traced, source)
        if f"{key} {tensor}" in seen:
            continue
        seen.add(f"{key} {tensor}")
        op, index = operand_of(key)
        is_output = index == OUTPUT
        quantizer = traced.quantizers[key]
        yield TensorRange(
            f"{op}.output" if is_output else f"{op}.input{index}",
            op,
            "output" if is_output else "input",
            None if is_output else index,
            tensor,
            quantizer.scheme.format,
            quantizer.scheme.bits,
            *_activation_numbers(quantizer),
        )


def cache_text(ranges: list[TensorRange], tensorrt_version: int) -> str:
    """Return the calibration cache of the activations whose range is known, in order."""
    widest: dict[str, float] = {}
    for found in ranges:
        if found.kind != "weight" and found.min is not None and found.max is not None:
            ends = (*_listed(found.min), *_listed(found.max))
            widest[found.tensor] = max(widest.get(found.tensor, 0.0), *map(abs, ends))
    lines = [f"TRT-{tensorrt_version}-EntropyCalibration2"]
    lines += [f"{tensor}: {scale_hex(amax / _INT8)}" for tensor, amax in widest.items()]
    return "\n".join(lines) + "\n"


def scale_hex(scale: float) -> str:
    """Return a scale as eight hexadecimal digits, big-endian IEEE-754 single."""
    return struct.pack(">f", scale).hex()


def _listed(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def _tensor_name(traced: Traced, source: fx.Node) -> str:
    """Return a node's name, that of the model's input where it is one."""
    inputs = [node for node in traced.module.graph.nodes if node.op == "placeholder"]
    return traced.example.names[inputs.index(source)] if source in inputs else source.name


Numbers = tuple[
    float | list[float] | None,
    int | list[int] | None,
    float | list[float] | None,
    float | list[float] | None,
]
"""Scale, zero point, min and max."""


def _activation_numbers(quantizer: Quantizer) -> Numbers:
    scheme, qparams = quantizer.scheme, quantizer.qparams
    if qparams is None:
        return None, None, None, None
    return _numbers(scheme, torch.as_tensor(whole_scale(qparams)), qparams.zero_point)


def _weight_numbers(weight: TracedWeight) -> Numbers:
    scheme = weight.scheme
    if not formats.get(scheme.format).has_codes:
        values = unpack_tensor(weight.parts, scheme, weight.shape, torch.float32)
        return None, None, values.min().item(), values.max().item()
    qparams = stored_qparams(weight.parts, scheme)
    return _numbers(scheme, torch.as_tensor(whole_scale(qparams)), qparams.zero_point)


def _numbers(scheme: TensorScheme, scale: Tensor, zero_point: Tensor | int | None) -> Numbers:
    """Return the parameters and the ends of the grid that they span."""
    fmt = formats.get(scheme.format)
    zero = torch.as_tensor(0 if zero_point is None else zero_point)
    low, high = scheme.quant_range if fmt.kind == "int" else fmt.ends
    wide = scale.double()
    zero_points = zero.tolist() if fmt.kind == "int" else None
    return (
        scale.tolist(),
        zero_points,
        ((low - zero) * wide).tolist(),
        ((high - zero) * wide).tolist(),
    )


def _json(traced: Traced, ranges: list[TensorRange], cache: str) -> bytes:
    return as_json(
        {
            "format": _FORMAT,
            "version": _VERSION,
            "cache_sha256": cache,
            "model_inputs": list(traced.example.names),
            "model_outputs": list(traced.outputs),
            "tensors": [asdict(found) for found in ranges],
        }
    )


def _notes(ranges: list[TensorRange], plan: Plan) -> tuple[str, ...]:
    dynamic = sum(found.scale is None and found.kind != "weight" for found in ranges)
    notes = [
        f"{len(ranges)} ranges of {len(plan.quantized)} ops; nothing in these files runs, so "
        "nothing was compared or timed."
    ]
    narrow = sum(found.kind != "weight" and found.bits != 8 for found in ranges)
    if narrow:
        notes.append(
            f"TensorRT's cache states int8 scales also for {narrow} tensors of other bits."
        )
    if dynamic:
        notes.append(f"{dynamic} activations take their scale from the data: the cache lacks them.")
    return tuple(notes)
