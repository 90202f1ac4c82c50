"""How a model withstands fewer and fewer bits: sweep() and SweepResult."""

import json
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from tuner.criteria import AccuracyGoal
from tuner.errors import SaveError, SpaceError, TunerError, TuningCancelled, UnsupportedError
from tuner.evaluation import Attempt, EvalFunc, Evaluator, evaluate_baseline
from tuner.isolation import copied, isolated_random_state
from tuner.model import InstrumentedModel
from tuner.op_rules import Shapes
from tuner.operands import Operands, Static, static_operands
from tuner.ops import Op
from tuner.plan import Plan
from tuner.presets import along_first_axes, channel_axis
from tuner.progress import Progress
from tuner.records import TrialRecord, encode_float, encode_floats, storable
from tuner.report import sweep as plot
from tuner.schemes import OpConfig, TensorScheme
from tuner.scores import Score
from tuner.simulate import calibrate_for, check_calib_samples, parameter_shapes
from tuner.sweep_entries import PARTS, Entry, Part, read_entries, read_parts

if TYPE_CHECKING:
    import pandas as pd

_VERSION = 1
FORMATS = ("int8", "int7", "int6", "int5", "int4", "int3", "int2")
FormatLike = str | TensorScheme | tuple[str, OpConfig]


@dataclass(frozen=True)
class SweepRow:
    """One evaluation: a format on all weights, on all inputs (activations), or on both.

    `drop` is how much worse than FP32, as a share of it: 0.01 is 1 %, negative is better, None
    where FP32 scores 0. Where the evaluation failed, `accuracy` is None and `error` the traceback.
    """

    format: str
    bits: int
    part: Part
    accuracy: float | None
    drop: float | None
    meets_goal: bool | None = None
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    duration_s: float = 0.0
    error: str | None = None

    @property
    def reason(self) -> str | None:
        """The last line of the error."""
        return None if self.error is None else self.error.strip().rpartition("\n")[2]


_ROW = TypeAdapter(SweepRow)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found: FP32's score, and a row for every format and part."""

    baseline: float
    rows: tuple[SweepRow, ...]
    goal: AccuracyGoal = field(default_factory=AccuracyGoal)

    @property
    def metric(self) -> str:
        """What the scores are called."""
        return self.goal.metric or "accuracy"

    def row(self, name: str, part: str) -> SweepRow | None:
        """Return the row of a format and a part, None where there is none."""
        return next((r for r in self.rows if (r.format, r.part) == (name, part)), None)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return one row per evaluation; FP32's, the `baseline`, is not among them."""
        import pandas as pd  # pandas takes half a second to import

        names = ("format", "bits", "part", "accuracy", "drop", "meets_goal", "duration_s")
        columns: dict[str, list[Any]] = {n: [getattr(r, n) for r in self.rows] for n in names}
        columns["error"] = [row.reason for row in self.rows]
        metrics = dict.fromkeys(name for row in self.rows for name in row.metrics)
        columns |= {f"metrics_{n}": [row.metrics.get(n) for row in self.rows] for n in metrics}
        return pd.DataFrame(columns)

    def summary(self) -> str:
        """Return the accuracy of every format, and its drop, as a table of text."""
        parts = [part for part in PARTS if any(row.part == part for row in self.rows)]
        table = [["format", "bits", *parts], ["FP32", "32", *[f"{self.baseline:.5g}"] * len(parts)]]
        for name in dict.fromkeys(row.format for row in self.rows):
            cells = [self.row(name, part) for part in parts]
            bits = min(row.bits for row in cells if row is not None)
            table.append([name, str(bits), *map(_cell, cells)])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        failed = [f"{r.format} {r.part} failed: {r.reason}" for r in self.rows if r.error]
        return "\n".join([*lines, *failed])

    def plot(self, path: str | Path) -> Path:
        """Write the metric against bits as a self-contained SVG; SaveError where it cannot."""
        return plot.write(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping of strict JSON that holds the whole result."""
        rows = [_row_to_dict(row) for row in self.rows]
        goal = self.goal.model_dump(mode="json")
        return {"version": _VERSION, "baseline": self.baseline, "goal": goal, "rows": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SweepResult":
        """Read what `to_dict` wrote; raises SaveError on anything else."""
        try:
            if data["version"] != _VERSION:
                raise SaveError(f"sweep version {data['version']!r}: this tuner reads {_VERSION}")
            goal = AccuracyGoal.model_validate_json(json.dumps(data["goal"]))
            rows = tuple(map(_row_from_dict, data["rows"]))
            return cls(_finite(data["baseline"]), rows, goal)
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            raise SaveError(f"not a sweep ({type(error).__name__}: {error})") from error


def sweep(
    model: nn.Module,
    calib_dataloader: Iterable[Any],
    eval_func: EvalFunc,
    formats: Sequence[FormatLike] = FORMATS,
    *,
    parts: Sequence[Part] = PARTS,
    goal: AccuracyGoal | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    calib_samples: int | None = None,
    progress: bool | None = None,
) -> SweepResult:
    """Evaluate a model under each format: on its weights only, its inputs only, and both.

    FP32 is evaluated once, the data are read once, and plans are exchanged in place on one copy.
    What `eval_func` raises under a format, NaN too, becomes that row's error, and so does a format
    that cannot be put on the model; the sweep goes on. TuningCancelled ends it with the rows so
    far; Ctrl-C is raised again with them as its `sweep_result`. Batch norm is not folded.

    Args:
        model: the float model; it is never changed.
        calib_dataloader: batches as fit() takes them.
        eval_func: takes the model and returns a score, as fit() takes it.
        formats: names, TensorSchemes (for weights and inputs as they are) or ("name", OpConfig).
            A name puts integers on as the presets do (weights per channel and symmetric, inputs
            per tensor and affine, from MSE), other scaled formats with weights per channel and
            inputs per tensor from minmax, block formats as they are. A bias scheme is for the
            ops that have a bias, and counts under "both" only.
        parts: any of "weights", "inputs" (all activations) and "both".
        goal: which metric counts, which direction is better, and what drop is allowed (1 % of
            FP32 by default).
        forward: `forward(model, batch)` calls the model on a batch, where the default cannot.
        calib_samples: how many samples to read at most.
        progress: a live display; None shows it on a terminal only.

    Raises:
        TunerError: the model, the data, a format or FP32's score cannot be used.
        Exception: whatever `eval_func` raises on the FP32 model, as it is.
    """
    entries, wanted = read_entries(formats), read_parts(parts)
    goal = _checked(eval_func, forward, goal)
    check_calib_samples(calib_samples)
    cases = [(entry, part) for entry in entries for part in entry.parts(wanted)]
    if not cases:
        raise TunerError(f"parts is {wanted}, but formats hold schemes for other parts only")
    with isolated_random_state() as random_state, Progress(progress) as bar:
        instrumented = InstrumentedModel(copied(model))
        bar.start(goal.describe(), None)
        bar.phase("calibrating")
        plans = _Plans(cases, parameter_shapes(instrumented.model))
        calibrate_for(instrumented, calib_dataloader, plans.operands, forward, calib_samples)
        if not any(op.by_default for op in instrumented.ops.values()):
            found = ", ".join(instrumented.ops) or "none"
            raise SpaceError(
                f"nothing in this model can be quantized. Ops that were found: {found}"
            )
        evaluate = Evaluator(eval_func, goal.metric, random_state)
        bar.phase("evaluating FP32")
        baseline = evaluate_baseline(evaluate, instrumented.model, {})
        return _Sweep(instrumented, plans, evaluate, goal, baseline, bar).run()


class _Plans:
    """What is put on, case by case."""

    def __init__(self, cases: Sequence[tuple[Entry, Part]], shapes: Shapes) -> None:
        self.cases = cases
        self._shapes = shapes

    def plan(self, ops: Mapping[str, Op], entry: Entry, part: Part) -> Plan:
        """Return the plan of one case for these ops."""
        uses = along_first_axes(ops)
        axes = {name: channel_axis(op, self._shapes) for name, op in uses.items()}
        default = (op for op in ops.values() if op.by_default)
        return Plan({op.name: entry.on(op, part, axes[op.name], self._shapes) for op in default})

    def operands(self, ops: Mapping[str, Op]) -> Operands:
        """Return the operands of each op that need a range, in any case."""
        found: dict[str, dict[Static, None]] = {}
        for entry, part in self.cases:
            for name, config in self.plan(ops, entry, part).items():
                statics = static_operands(ops[name], config)
                found.setdefault(name, {}).update(dict.fromkeys(statics))
        return {name: tuple(statics) for name, statics in found.items()}


class _Sweep:
    """One run over the formats."""

    def __init__(
        self,
        model: InstrumentedModel,
        plans: _Plans,
        evaluate: Evaluator,
        goal: AccuracyGoal,
        baseline: TrialRecord,
        progress: Progress,
    ) -> None:
        assert baseline.accuracy is not None
        self._model = model
        self._plans = plans
        self._evaluate = evaluate
        self._goal = goal
        self._baseline = baseline
        self._fp32 = baseline.accuracy
        self._progress = progress
        self._records: list[TrialRecord] = []

    def run(self) -> SweepResult:
        """Evaluate every case; TuningCancelled ends it with the rows so far."""
        cases = self._plans.cases
        self._progress.start(self._goal.describe(self._fp32), len(cases))
        rows: list[SweepRow] = []
        try:
            for entry, part in cases:
                rows.append(self._row(entry, part))
        except TuningCancelled:
            pass
        except KeyboardInterrupt as interrupt:
            interrupt.sweep_result = self._result(rows)  # type: ignore[attr-defined]
            raise
        return self._result(rows)

    def _result(self, rows: Sequence[SweepRow]) -> SweepResult:
        return SweepResult(self._fp32, tuple(rows), self._goal)

    def _row(self, entry: Entry, part: Part) -> SweepRow:
        plan = self._plans.plan(self._model.ops, entry, part)
        record = self._evaluated(plan, f"{entry.name} {part}")
        self._records.append(record)
        complete = [r for r in (self._baseline, *self._records) if r.accuracy is not None]
        best = min(complete, key=lambda r: self._drop(r.accuracy))
        self._progress.trial(record, best, self._baseline)
        scored = record.accuracy is not None
        relative = self._drop(record.accuracy) / abs(self._fp32) if scored and self._fp32 else None
        return SweepRow(
            format=entry.name,
            bits=entry.bits(part),
            part=part,
            accuracy=record.accuracy,
            drop=relative,
            meets_goal=record.meets_goal if scored else None,
            metrics=record.metrics,
            duration_s=record.duration_s,
            error=record.error,
        )

    def _evaluated(self, plan: Plan, reason: str) -> TrialRecord:
        attempt = self._attempt(plan)
        accuracy = attempt.score.accuracy
        meets = attempt.error is None and self._goal.meets(accuracy, self._fp32)
        return attempt.record(len(self._records) + 1, plan, reason, {}, meets)

    def _attempt(self, plan: Plan) -> Attempt:
        try:
            self._model.apply(plan)
        except Exception:  # a format of the user's may raise anything: it is this row's failure
            error = storable(traceback.format_exc())
            self._take_off()
            return Attempt(Score(float("nan")), 0.0, error)
        return self._evaluate.attempt(self._model.model)

    def _take_off(self) -> None:
        """Give the model its float weights back, also those of an op that was half done."""
        self._model.apply({})
        for op in self._model.ops.values():
            for ref in op.weights:
                self._model.weights.set(ref, None)

    def _drop(self, accuracy: float | None) -> float:
        """Return how much worse than FP32 an accuracy is, in its own units."""
        assert accuracy is not None
        drop = self._fp32 - accuracy
        return drop if self._goal.prefers_higher else -drop


def _checked(eval_func: object, forward: object, goal: AccuracyGoal | None) -> AccuracyGoal:
    """Return the goal; refuse arguments of wrong types."""
    if not callable(eval_func):
        raise TunerError(f"eval_func is a {type(eval_func).__name__}: give a function")
    if forward is not None and not callable(forward):
        raise TunerError(f"forward is a {type(forward).__name__}: give a function")
    if goal is not None and not isinstance(goal, AccuracyGoal):
        raise TunerError(f"goal is a {type(goal).__name__}: give an AccuracyGoal")
    if goal is not None and goal.confidence is not None:
        raise UnsupportedError(
            "AccuracyGoal(confidence=…) is not supported by a sweep: leave it out"
        )
    return AccuracyGoal() if goal is None else goal


def _row_to_dict(row: SweepRow) -> dict[str, Any]:
    drop = None if row.drop is None else encode_float(row.drop)
    return asdict(row) | {"drop": drop, "metrics": encode_floats(row.metrics)}


def _row_from_dict(data: Mapping[str, Any]) -> SweepRow:
    """Read a row; raises ValueError or TypeError where it is none."""
    row = _ROW.validate_python(data)
    unknown = [name for name in data if not hasattr(row, name)]
    if unknown:
        raise ValueError(f"unknown fields {unknown}")
    if row.accuracy is not None:
        _finite(row.accuracy)
    return row


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a score is {number}")
    return number


def _cell(row: SweepRow | None) -> str:
    if row is None:
        return "–"
    if row.accuracy is None:
        return "failed"
    drop = "" if row.drop is None else f" ({0.0 - 100 * row.drop:+.1f} %)".replace("-", "−")
    return f"{row.accuracy:.5g}{drop}"
