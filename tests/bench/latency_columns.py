"""The table of searches for latency: its columns, and what is said before it."""

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]

INTRODUCTION = """\
`python tests/bench/latency.py`: searches with `objective="latency"` for a runtime, from empty
caches, with the threads below (1 % goal; ResNet-18 by calibration alone). Times are those of a call
at batch 1; FP32 is the same runtime's, of PyTorch the faster of compiled and op by op. Of plans
that meet the goal, each is measured in turns with FP32; one that is not 2 % faster, beyond the
noise, never comes back. **exported** is the same ratio as the export of the plan reports it; for
PyTorch FP32 is there, too, the faster of the two. **ρ** is the rank correlation of predicted and
measured times over the plans measured, of four at least. Up to eight other programs ran on the two
cores: ratios are of calls in turns, but the seconds say little.
"""


def _exported(row: Row) -> str:
    entry = row["exported"]
    if entry is None:
        return "–"
    floats = (entry["float_ms"], entry.get("baselines_ms", {}).get("FP32 compiled", float("inf")))
    return f"{min(floats) / entry['quantized_ms']:.2f}"


def _spread(row: Row) -> str:
    costs = row["best_costs"]
    return "{latency_ms:.3g} ({latency_lower_ms:.3g} to {latency_upper_ms:.3g})".format(**costs)


def _kept_goal(row: Row) -> str:
    return "–" if row["goal"] is None else f"{row['simulated']:.4f}: {row['goal']}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("VNNI", lambda r: "yes" if r["has_vnni"] else "no"),
    ("space", lambda r: r["space"]),
    ("target", lambda r: r["target"]),
    ("evaluations", lambda r: str(r["evaluations"])),
    ("plans measured", lambda r: str(r["plans_measured"])),
    ("ops timed", lambda r: str(r["ops_timed"])),
    ("wall s", lambda r: f"{r['wall_s']:.0f}"),
    ("of it timing", lambda r: f"{sum(r['timing_s'].values()):.0f}"),
    ("of it eval_func", lambda r: f"{r['eval_s']:.0f}"),
    ("FP32 ms", lambda r: f"{r['baseline_costs']['latency_ms']:.3g}"),
    ("ms (quartiles)", _spread),
    ("FP32 ÷ plan", lambda r: f"{r['speedup']:.2f}"),
    ("predicted", lambda r: _ratio(r["predicted_speedup"])),
    ("exported", _exported),
    ("ρ", lambda r: _ratio(r["rank_correlation"])),
    ("metric and goal", _kept_goal),
    ("ops quantized", lambda r: f"{r['quantized_ops']} of {r['ops']}"),
)
