"""The table of ops: what was chosen for each, what it costs and what it is predicted to harm."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tuner.costs import CostModel
from tuner.graph import OpGraph
from tuner.plan import Plan
from tuner.records import OpSummary, describe_config
from tuner.schemes import OpConfig


def op_table(
    graph: OpGraph,
    plan: Plan,
    costs: CostModel,
    damages: Mapping[str, Mapping[OpConfig, float]],
    objective: str,
) -> tuple[OpSummary, ...]:
    """Return a row for every op of the plan; `damages` maps op → configuration → damage."""
    total = costs.costs(plan)
    whole = (total.size_bytes if objective == "size" else total.bops) or 1.0
    rows = []
    for name, config in plan.items():
        op = graph.ops[name]
        size, bops = costs.op_bytes(op, config), costs.bops(op, config)
        shape = costs.weight_shape(op.weights[0]) if op.weights else op.output_shape
        rows.append(
            OpSummary(
                name=name,
                type=op.type,
                shape=shape,
                parameters=op.parameters,
                macs=op.macs,
                choice=describe_config(config),
                predicted_damage=damages.get(name, {}).get(config, 0.0),
                size_bytes=size,
                bops=bops,
                cost_share=(size if objective == "size" else bops) / whole,
            )
        )
    return tuple(rows)


def op_table_rich(rows: Sequence[OpSummary]) -> Table:
    """Return the table for a terminal."""
    table = Table(box=None, pad_edge=False)
    for header, justify in _COLUMNS:
        table.add_column(header, justify=justify, no_wrap=header != "op")
    for row in rows:
        table.add_row(
            row.name or "(the model)",
            row.type,
            "x".join(map(str, row.shape)),
            row.choice,
            f"{row.predicted_damage:.2e}",
            f"{row.cost_share:.1%}",
        )
    return table


def op_table_text(rows: Sequence[OpSummary]) -> str:
    """Return the table as plain text."""
    console = Console(width=120, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(op_table_rich(rows))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("op", "left"),
    ("type", "left"),
    ("shape", "left"),
    ("choice", "left"),
    ("predicted damage", "right"),
    ("share of cost", "right"),
)
