"""What an exporter must say and do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import ExportError
from tuner.exporters.report import ExportReport
from tuner.exporters.tracing import Traced
from tuner.ops import Op
from tuner.plan import Plan
from tuner.schemes import OpConfig

Call = Callable[[], object]


@dataclass(frozen=True, eq=False)
class ExportRequest:
    """What is to be exported, to where, and what is to be measured.

    What is at `path` is moved to where the user wants it once the export is done: nothing may
    refer to it by its folder.
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

    `suffix` is how the path of its file ends; a path that ends otherwise is a folder for its files.
    `is_exact_at_a_cost` tells whether slower kernels take over where those that `saturates` speaks
    of would overflow. `reads_sums` tells whether its integer convolutions want residual sums with
    quantized inputs, `adds_before_rounding` whether one of them adds to its own output before that
    is rounded, and `rounds_biases` names the ops that count biases in steps of input scale × weight
    scale, as "Conv" for those of any number of axes. `checked_by` is the target whose kernels run
    its artifacts here, where that is another one.
    """

    target: str
    suffix: str | None = None
    reads_sums = False
    adds_before_rounding = False
    rounds_biases: tuple[str, ...] = ()
    is_exact_at_a_cost = False
    checked_by: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its files in a folder, but for data that go beside them."""
        return () if self.suffix is None else (f"model{self.suffix}",)

    @abstractmethod
    def why_not(self, op: Op, config: OpConfig) -> str | None:
        """Return why the target has no low-precision kernel for an op's choice, None if it has."""

    @property
    def saturates(self) -> bool:
        """Whether sums of products of 8-bit codes overflow in its kernels on this CPU.

        Weights of 7 bits are then what it is exact with.
        """
        return False

    def check(self, traced: Traced) -> None:
        """Raise ExportError where the target cannot run a model at all: it is traced in FP32."""
        return None  # that it could be traced is enough

    @property
    def runtime(self) -> str:
        """The runtime's name and version, under which times are kept; raises ExportError if none.

        `objective="latency"` is for targets that have one.
        """
        raise ExportError(
            f"target {self.target!r} is no runtime that can be timed here: for objective='latency' "
            "choose onnxruntime, openvino or torch"
        )

    def compiled(self, traced: Traced, batch: int = 1, on_codes: bool = False) -> Call:
        """Return a call that runs a traced model in the runtime on its example.

        With `on_codes` the quantization of the inputs, and the dequantization of the outputs, are
        left out: it takes and gives the codes themselves.
        """
        raise ExportError(f"target {self.target!r} has no runtime: {self.runtime}")

    def compiled_alone(self, traced: Traced, on_codes: bool = False) -> Call:
        """Return a call of one op: what `compiled` gives, or what is made more quickly."""
        return self.compiled(traced, len(traced.example.tensors[0]), on_codes)

    @abstractmethod
    def export(self, request: ExportRequest) -> ExportReport:
        """Write the artifact, check it against the simulation, measure it.

        Raises ExportError where a file cannot be written, a package is missing, or the artifact
        does not agree.
        """
