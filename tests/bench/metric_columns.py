"""The table of metrics on artifacts and simulations, over many queries."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

INTRODUCTION = """\
`python tests/bench/metric.py`: MiniLM in a mixed plan (tuned with mixed-int on 200 pairs, 1 % goal)
on each runtime, and in the simulation; each query is searched among 800 docstrings. The last bit of
a sum moves single ranks to and fro, here a share of them: over many queries that evens out. ± is
the standard error of the difference, over the queries.
"""


def _metric(name: str, way: str) -> Callable[[Row], str]:
    return lambda row: f"{row[way][name]:.4f}"


def _apart(name: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        simulated = row["simulation"][name]
        error = row["standard_error"][name] / simulated
        return f"{row['artifact'][name] / simulated - 1:+.3%} ± {error:.3%}"

    return text


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("target", lambda row: row["target"]),
    ("queries", lambda row: str(row["queries"])),
    ("ops quantized", lambda row: str(row["quantized_ops"])),
    *(
        column
        for name in ("recall@10", "mean of 1 ÷ rank", "ROC AUC")
        for column in (
            (f"{name}: FP32", _metric(name, "FP32")),
            ("simulation", _metric(name, "simulation")),
            ("artifact", _metric(name, "artifact")),
            ("artifact against simulation", _apart(name)),
        )
    ),
    ("other ranks", lambda row: f"{row['other_ranks']:.1%}"),
)
"""Title and text of each column."""
