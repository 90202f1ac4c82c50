"""Warns where FP32 comes back, and says why: no plan met the goal, or none is faster."""

import warnings

from tuner.errors import NothingQuantizedWarning
from tuner.results import TuningResult


def warn_if_nothing_quantized(result: TuningResult, stacklevel: int) -> None:
    """Warn of a result that has no quantized op; `stacklevel` counts from the caller, as 1."""
    if not result.quantized_ops:
        text = _slower(result) or _none_met(result)
        warnings.warn(text, NothingQuantizedWarning, stacklevel=stacklevel + 1)


def _slower(result: TuningResult) -> str | None:
    """Say that plans met the goal, but took longer than FP32; None where that is not so."""
    fit = (t for t in result.trials if t.meets_goal is not False and "latency_ms" in t.costs)
    met = sorted(fit, key=lambda trial: trial.costs["latency_ms"])
    if not met or result.config.objective != "latency":
        return None
    fastest = met[0].costs
    times = [fastest["latency_ms"], fastest["latency_lower_ms"], fastest["latency_upper_ms"]]
    shown = "{:.3g} ms ({:.3g} to {:.3g})".format(*times)
    return (
        f"nothing was quantized: {len(met)} of {len(result.trials)} plans met the goal, but the "
        f"fastest of them takes {shown} in {result.config.target}, FP32 "
        f"{result.baseline_costs['latency_ms']:.3g} ms: none is faster beyond the noise. Keep FP32 "
        "there, allow more trials, or choose objective='size'"
    )


def _none_met(result: TuningResult) -> str:
    dearest = sorted(result.op_table, key=lambda row: -row.cost_share)[:3]
    shown = ", ".join(f"{row.name} ({row.cost_share:.0%} of the cost)" for row in dearest)
    mend = "Allow a larger drop, more trials or a wider space"
    if result.goal_met is False:
        mend = f"FP32 itself misses it, with {result.baseline:.6g}: set a goal that it meets"
    return (
        f"nothing was quantized: of {len(result.trials)} plans none that is cheaper than FP32 met "
        f"the goal ({result.goal.describe(result.baseline)}). The ops that cost most: {shown}. "
        f"{mend}"
    )
