"""The HTML page of one tuning result: one file, no script, nothing fetched."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import BaseLoader, Environment, PackageLoader, StrictUndefined

from tuner.records import OpSummary
from tuner.report import text
from tuner.report.files import write_whole
from tuner.report.scatter import scatter
from tuner.report.source import ReportSource

_TEMPLATE = "report.html"
_OBJECTIVES = {"size": "size", "bops": "bit operations", "latency": "latency"}
_STOPPED = {
    "goal_met_and_minimal": "the goal is met and nothing cheaper is likely to meet it",
    "max_trials": "the budget of trials was used up",
    "timeout": "the time was used up",
    "exhausted": "the strategy had nothing left to try",
    "cancelled": "it was cancelled",
    "no_eval_func": "there was no eval_func: the model was calibrated only",
}
_FLOAT_BITS = 32
SHADES = (2, 3, 4, 6, 8, 16, _FLOAT_BITS)
"""The steps of the colour scale of bits."""


@dataclass(frozen=True)
class OpRow:
    """One op as the bit map shows it: bits of weight and inputs (None where not applicable)."""

    op: OpSummary
    weight_bits: int | None
    input_bits: int | None
    damage_share: float
    cost_width: float


def write(source: ReportSource, path: str | Path) -> Path:
    """Write the report to `path`, whole or not at all; raises SaveError where it cannot."""
    return write_whole("the report", path, render(source))


def html_environment(loader: BaseLoader) -> Environment:
    """Return what draws templates: everything is escaped, and numbers are told as people do."""
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "percent": text.percent,
        "count": text.count,
        "size": text.size,
        "seconds": text.seconds,
        "shape": text.shape,
        "shade": shade,
    }
    return environment


def render(source: ReportSource) -> str:
    """Return the report as HTML."""
    environment = html_environment(PackageLoader("tuner.report", "."))
    return environment.get_template(_TEMPLATE).render(
        result=source,
        headline=_headline(source),
        change=_change(source),
        stopped=_STOPPED[source.stop_reason],
        objective=_OBJECTIVES[source.config.objective],
        plot=scatter(source),
        front={record.number for record in source.pareto()},
        rows=_op_rows(source.op_table),
        repaired=[op for op in source.op_table if op.repairs],
        shades=SHADES,
        uncovered_share=_uncovered_share(source),
        config=source.config.model_dump_json(indent=2),
    )


def _headline(source: ReportSource) -> str:
    if source.goal_met is None:
        return "Quantized by calibration alone: the accuracy was not measured"
    if not source.goal_met:
        return "The goal was not met"
    if source.quantized_ops == 0:
        return "Only the FP32 model meets the goal: nothing was quantized"
    share = text.percent(source.cost_ratio(source.best))
    return f"The goal is met at {share} of FP32's {_OBJECTIVES[source.config.objective]}"


def _change(source: ReportSource) -> str | None:
    """Return how the accuracy changed against FP32, as a signed percentage of it."""
    ours, theirs = source.best.accuracy, source.baseline_trial.accuracy
    if ours is None or theirs is None:
        return None
    if not theirs:
        return f"{ours - theirs:+.4g}"
    return f"{100 * (ours - theirs) / abs(theirs):+.3g} %".replace("-", "−")


def _op_rows(ops: tuple[OpSummary, ...]) -> list[OpRow]:
    worst = max(
        (op.predicted_damage for op in ops if math.isfinite(op.predicted_damage)), default=0
    )
    dearest = max((op.cost_share for op in ops), default=0)
    return [
        OpRow(
            op=op,
            weight_bits=None if op.parameters == 0 else bits_of("W", op.choice),
            input_bits=bits_of("A", op.choice),
            damage_share=min(op.predicted_damage / worst, 1.0) if worst > 0 else 0.0,
            cost_width=op.cost_share / dearest if dearest > 0 else 0.0,
        )
        for op in ops
    ]


def bits_of(operand: str, choice: str) -> int:
    """Return the bits that a label such as W4A8 gives an operand; the most of A8/A4 is 8."""
    found = [int(bits) for bits in re.findall(rf"{operand}(\d+)", choice)]
    return max(found, default=_FLOAT_BITS)


def shade(bits: int) -> int:
    """Return the step of the colour scale that holds this many bits."""
    return next((step for step in SHADES if bits <= step), _FLOAT_BITS)


def _uncovered_share(source: ReportSource) -> float:
    """Return the share of the model's MACs that lies in calls that cannot be quantized."""
    left_out = math.fsum(source.uncovered.values())
    total = left_out + math.fsum(op.macs for op in source.op_table)
    return left_out / total if total else 0.0
