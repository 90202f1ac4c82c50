"""What an export gave: its files, how far it agrees with the simulation, and how fast it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of an artifact are from those of the simulated model, on real inputs.

    `floor` is the largest difference that the simulation itself shows when every quantized tensor,
    every sum of products of what is not quantized, and every output is disturbed by some 1e-6 of
    its values: rounding makes such differences grow, and no two runtimes can be expected to agree
    better.
    `argmax` is the share of rows of the first output with the same largest element, None where it
    has only one column.
    """

    max_abs: float
    mean_abs: float
    argmax: float | None
    floor: float
    samples: int


@dataclass(frozen=True)
class LayerAgreement:
    """How far one quantized tensor is from the simulation where all before it are as simulated.

    `max_steps` counts quantization steps; `equal` is the share of equal codes.
    """

    name: str
    max_steps: float
    equal: float


@dataclass(frozen=True)
class Latency:
    """Median times of one call, FP32 and quantized in the same runtime, measured in turns.

    `spread_ms` are the lower and upper quartiles of the quantized times. `baselines_ms` are the
    medians of what else there is without quantization: FP32 compiled, BF16 compiled, FP32 in
    another runtime.
    """

    batch: int
    float_ms: float
    quantized_ms: float
    spread_ms: tuple[float, float]
    baselines_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """How many times faster than FP32."""
        return self.float_ms / self.quantized_ms


@dataclass(frozen=True)
class LeftFloat:
    """An op that is not computed in low precision, and why."""

    op: str
    reason: str


@dataclass(frozen=True)
class ExportReport:
    """What an export gave.

    `files` are what was written, first the one that names the others. `metric` is what eval_func
    said of the artifact, if it was asked, and `simulated_metric` what it said of the simulation.
    `metric_floor` is how far that moves under the same disturbance (see Agreement.floor): the
    largest difference of one or two draws, None where both metrics are within 0.2 % of each other,
    and nothing had to be drawn.
    """

    target: str
    files: tuple[Path, ...]
    size_bytes: int
    float_size_bytes: int | None
    agreement: Agreement | None
    layers: tuple[LayerAgreement, ...] = ()
    latency: tuple[Latency, ...] = ()
    left_float: tuple[LeftFloat, ...] = ()
    metric: float | None = None
    notes: tuple[str, ...] = ()
    simulated_metric: float | None = None
    metric_floor: float | None = None

    @property
    def size_ratio(self) -> float | None:
        """The size of the files as a share of FP32's in the same format, None without weights."""
        return None if self.float_size_bytes is None else self.size_bytes / self.float_size_bytes

    def to_dict(self) -> Mapping[str, Any]:
        """Return the report as JSON has it."""
        return {**asdict(self), "files": [str(path) for path in self.files]}

    def summary(self) -> str:
        """Return a few lines for people."""
        lines = [
            f"Exported for {self.target}: {', '.join(str(path) for path in self.files)}",
            f"Size: {self.size_bytes / 1024:.0f} KiB{_share(self.size_ratio)}",
        ]
        lines += _agreement_lines(self)
        lines += _latency_lines(self)
        lines += _metric_lines(self)
        lines += [f"Not in low precision: {left.op}: {left.reason}" for left in self.left_float]
        return "\n".join([*lines, *self.notes])


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f", {ratio:.1%} of FP32"


def _latency_lines(report: ExportReport) -> list[str]:
    lines = [_latency_line(entry) for entry in report.latency]
    if lines and all(entry.speedup < 1 for entry in report.latency):
        lines.append(
            "FP32 is faster here: ops this small gain nothing from integers, or too many of them "
            'stayed float. fit() with objective="latency" returns only what is faster'
        )
    return lines


def _latency_line(entry: Latency) -> str:
    lower, upper = entry.spread_ms
    others = (
        f", {name} {time:.3g} ms: {time / entry.quantized_ms:.2f}×"
        for name, time in entry.baselines_ms.items()
    )
    return (
        f"Latency at batch {entry.batch}: {entry.quantized_ms:.3g} ms "
        f"({lower:.3g} to {upper:.3g}), FP32 {entry.float_ms:.3g} ms: {entry.speedup:.2f}×"
        + "".join(others)
    )


def _metric_lines(report: ExportReport) -> list[str]:
    if report.metric is None:
        return []
    line = f"eval_func on the artifact: {report.metric:.5g}"
    if report.simulated_metric is not None:
        apart = abs(report.metric - report.simulated_metric)
        line += f", on the simulation: {report.simulated_metric:.5g} ({apart:.3g} apart)"
    if report.metric_floor is not None:
        line += f"; the simulation's own floor is {report.metric_floor:.3g}"
    return [line]


def _agreement_lines(report: ExportReport) -> list[str]:
    found = report.agreement
    if found is None:
        return []
    argmax = "" if found.argmax is None else f", same argmax in {found.argmax:.2%}"
    lines = [
        f"Agreement with the simulation on {found.samples} samples: at most {found.max_abs:.3g}, "
        f"on average {found.mean_abs:.3g}{argmax}; the simulation's own floor is {found.floor:.3g}"
    ]
    if report.layers:
        worst = max(report.layers, key=lambda layer: layer.max_steps)
        lines.append(
            f"Layer by layer: {len(report.layers)} quantized tensors, at most "
            f"{worst.max_steps:.3g} steps apart ({worst.name})"
        )
    return lines
