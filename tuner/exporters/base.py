"""What an exporter must say and do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.exporters.report import ExportReport
from tuner.exporters.tracing import Traced
from tuner.ops import Op
from tuner.plan import Plan
from tuner.schemes import OpConfig


@dataclass(frozen=True, eq=False)
class ExportRequest:
    """What is to be exported, to where, and what is to be measured.

    `batches` are the batch sizes whose latency is measured, none where nothing is to be measured.
    """

    traced: Traced
    plan: Plan
    ops: dict[str, Op]
    path: Path
    batches: tuple[int, ...] = (1, 8)
    evaluate: Callable[[Callable[..., Any]], float] | None = None


class Exporter(ABC):
    """One deployment target. `target` is its name.

    `reads_sums` tells whether its integer convolutions want residual sums with quantized inputs.
    """

    target: str
    reads_sums = False

    @abstractmethod
    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why the target has no low-precision kernel for an op's choice, None if it has."""

    @abstractmethod
    def export(self, request: ExportRequest) -> ExportReport:
        """Write the artifact, check it against the simulation, measure it.

        Raises ExportError where a file cannot be written, a package is missing, or the artifact
        does not agree.
        """
