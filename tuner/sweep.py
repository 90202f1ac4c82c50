"""How a model withstands fewer and fewer bits: sweep() and SweepResult."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError
from torch import nn

from tuner.criteria import AccuracyGoal
from tuner.errors import SaveError, SpaceError, TunerError, TuningCancelled
from tuner.evaluation import EvalFunc, Evaluator, evaluate_baseline
from tuner.isolation import copied, isolated_random_state
from tuner.model import InstrumentedModel
from tuner.operands import Operands, Static, static_operands
from tuner.ops import Op
from tuner.plan import Plan
from tuner.progress import Progress
from tuner.records import TrialRecord, decode_floats, encode_floats
from tuner.report import sweep as plot
from tuner.schemes import OpConfig, TensorScheme
from tuner.simulate import calibrate_for
from tuner.sweep_entries import PARTS, Entry, Part, read_entries, read_parts

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

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per evaluation; FP32's, the `baseline`, is not among them."""
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
        rows = [asdict(row) | {"metrics": encode_floats(row.metrics)} for row in self.rows]
        goal = self.goal.model_dump(mode="json")
        return {"version": _VERSION, "baseline": self.baseline, "goal": goal, "rows": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SweepResult":
        """Read what `to_dict` wrote; raises SaveError on anything else."""
        try:
            if data["version"] != _VERSION:
                raise SaveError(f"sweep version {data['version']!r}: this tuner reads {_VERSION}")
            rows = (SweepRow(**{**r, "metrics": decode_floats(r["metrics"])}) for r in data["rows"])
            goal = AccuracyGoal.model_validate_json(json.dumps(data["goal"]))
            return cls(float(data["baseline"]), tuple(rows), goal)
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
    What `eval_func` raises under a format, NaN too, becomes that row's error, and the sweep goes
    on. Batch norm is not folded.

    Args:
        model: the float model; it is never changed.
        calib_dataloader: batches as fit() takes them.
        eval_func: takes the model and returns a score, as fit() takes it.
        formats: names, TensorSchemes (for weights and inputs as they are) or ("name", OpConfig).
            A name puts integers on as the presets do (weights per channel and symmetric, inputs
            per tensor and affine, from MSE), other scaled formats with weights per channel and
            inputs per tensor from minmax, block formats as they are.
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
    with isolated_random_state() as random_state, Progress(progress) as bar:
        instrumented = InstrumentedModel(copied(model))
        bar.start(goal.describe(), None)
        bar.phase("calibrating")
        calibrate_for(instrumented, calib_dataloader, _operands_of(entries), forward, calib_samples)
        if not any(op.by_default for op in instrumented.ops.values()):
            found = ", ".join(instrumented.ops) or "none"
            raise SpaceError(
                f"nothing in this model can be quantized. Ops that were found: {found}"
            )
        evaluate = Evaluator(eval_func, goal.metric, random_state)
        bar.phase("evaluating FP32")
        baseline = evaluate_baseline(evaluate, instrumented.model, {})
        return _Sweep(instrumented, evaluate, goal, baseline, bar).run(entries, wanted)


class _Sweep:
    """One run over the formats."""

    def __init__(
        self,
        model: InstrumentedModel,
        evaluate: Evaluator,
        goal: AccuracyGoal,
        baseline: TrialRecord,
        progress: Progress,
    ) -> None:
        assert baseline.accuracy is not None
        self._model = model
        self._evaluate = evaluate
        self._goal = goal
        self._baseline = baseline
        self._fp32 = baseline.accuracy
        self._progress = progress
        self._records: list[TrialRecord] = []

    def run(self, entries: Sequence[Entry], wanted: Sequence[Part]) -> SweepResult:
        """Evaluate every part of every entry; TuningCancelled ends it with the rows so far."""
        cases = [(entry, part) for entry in entries for part in entry.parts(wanted)]
        self._progress.start(self._goal.describe(self._fp32), len(cases))
        rows = []
        try:
            for entry, part in cases:
                rows.append(self._row(entry, part))
        except TuningCancelled:
            pass
        return SweepResult(self._fp32, tuple(rows), self._goal)

    def _row(self, entry: Entry, part: Part) -> SweepRow:
        ops = self._model.ops.values()
        plan = Plan({op.name: entry.on(op, part) for op in ops if op.by_default})
        self._model.apply(plan)
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
        attempt = self._evaluate.attempt(self._model.model)
        accuracy = attempt.score.accuracy
        meets = attempt.error is None and self._goal.meets(accuracy, self._fp32)
        return attempt.record(len(self._records) + 1, plan, reason, {}, meets)

    def _drop(self, accuracy: float | None) -> float:
        """Return how much worse than FP32 an accuracy is, in its own units."""
        assert accuracy is not None
        drop = self._fp32 - accuracy
        return drop if self._goal.prefers_higher else -drop


def _operands_of(entries: Sequence[Entry]) -> Callable[[Mapping[str, Op]], Operands]:
    def wanted(ops: Mapping[str, Op]) -> Operands:
        found: dict[str, tuple[Static, ...]] = {}
        for op in ops.values():
            if op.by_default:
                static = (s for e in entries for s in static_operands(op, e.on(op, "both")))
                found[op.name] = tuple(dict.fromkeys(static))
        return found

    return wanted


def _checked(eval_func: object, forward: object, goal: AccuracyGoal | None) -> AccuracyGoal:
    """Return the goal; refuse arguments of wrong types."""
    if not callable(eval_func):
        raise TunerError(f"eval_func is a {type(eval_func).__name__}: give a function")
    if forward is not None and not callable(forward):
        raise TunerError(f"forward is a {type(forward).__name__}: give a function")
    if goal is not None and not isinstance(goal, AccuracyGoal):
        raise TunerError(f"goal is a {type(goal).__name__}: give an AccuracyGoal")
    return AccuracyGoal() if goal is None else goal


def _cell(row: SweepRow | None) -> str:
    if row is None:
        return "–"
    if row.accuracy is None:
        return "failed"
    drop = "" if row.drop is None else f" ({0.0 - 100 * row.drop:+.1f} %)".replace("-", "−")
    return f"{row.accuracy:.5g}{drop}"
