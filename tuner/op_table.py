"""The table of ops: what was chosen for each, what it costs and what it is predicted to harm."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from tuner.costs import CostModel
from tuner.graph import OpGraph
from tuner.plan import Plan
from tuner.records import OpSummary, describe_config
from tuner.schemes import OpConfig

Damages = Mapping[str, Mapping[OpConfig, float]]
"""Op → configuration → predicted damage."""


def op_table(
    graph: OpGraph,
    plan: Plan,
    costs: CostModel,
    damages: Damages,
    objective: str,
    unrepaired: Damages | None = None,
) -> tuple[OpSummary, ...]:
    """Return a row for every op of the plan; `unrepaired` are the damages without repairs."""
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
                repairs=tuple(map(str, config.recovery)),
                unrepaired_damage=(unrepaired or {}).get(name, {}).get(config),
            )
        )
    return tuple(rows)


def op_table_rich(rows: Sequence[OpSummary]) -> Group:
    """Return the table for a terminal, and below it what repairs buy where there are any."""
    table = _empty_table(_COLUMNS)
    for row in rows:
        table.add_row(
            _name(row),
            row.type,
            "x".join(map(str, row.shape)),
            row.choice,
            f"{row.predicted_damage:.2e}",
            f"{row.cost_share:.1%}",
        )
    repaired = [row for row in rows if row.repairs]
    return Group(table, "", _repairs(repaired)) if repaired else Group(table)


def _repairs(rows: Sequence[OpSummary]) -> Table:
    table = _empty_table(_REPAIR_COLUMNS)
    for row in rows:
        gain = row.repair_gain
        bought = "" if gain is None else f"÷ {gain:.3g}"
        table.add_row(_name(row), ", ".join(row.repairs), bought)
    return table


def _empty_table(columns: Sequence[tuple[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for header, justify in columns:
        table.add_column(header, justify=justify, no_wrap=header != "op")
    return table


def _name(row: OpSummary) -> str:
    return row.name or "(the model)"


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
_REPAIR_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("op", "left"),
    ("repairs", "left"),
    ("predicted damage", "right"),
)
