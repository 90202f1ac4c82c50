"""The bit map: one row an op in the order of execution, with its bits, damage and cost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.dashboard.plans import Ops, label
from tuner.records import OpSummary
from tuner.report.page import bits_of
from tuner.report.text import count, percent, shape, size

Options = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Op → label → {"config", "damage"}: what a study's payload keeps."""

_FLOAT_BITS = 32


@dataclass(frozen=True)
class BitRow:
    """One op. `weight_bits` is None where it has no weight; what is not known yet is None, too.

    The widths, 0…1, are those of the bars: damage and cost ÷ the largest of the map.
    """

    name: str
    choice: str
    weight_bits: int | None
    input_bits: int
    damage: float | None = None
    cost_share: float | None = None
    is_estimate: bool = False
    summary: OpSummary | None = None
    damage_width: float = 0.0
    cost_width: float = 0.0

    @property
    def tip(self) -> str:
        """All that is known of the op, a line each."""
        facts = [self.name or "(the model)", self.choice]
        if self.summary is not None:
            op = self.summary
            facts[1] = f"{op.type} {shape(op.shape)} · {self.choice}"
            facts.append(f"{count(op.parameters)} parameters · {count(op.macs)} MACs")
        if self.cost_share is not None:
            facts.append(f"share of cost {'≈ ' * self.is_estimate}{percent(self.cost_share)}")
        if self.summary is not None and not self.is_estimate:
            facts.append(f"{size(self.summary.size_bytes)} · {count(self.summary.bops)} BOPs")
        if self.damage is not None:
            facts.append(f"predicted damage {self.damage:.2g}")
        return "\n".join(facts)


@dataclass(frozen=True)
class BitMap:
    """The rows, and how many of them are quantized."""

    rows: tuple[BitRow, ...]

    @property
    def quantized(self) -> int:
        """How many ops are not FP32."""
        return sum(row.choice != "FP32" for row in self.rows)

    @property
    def has_damage(self) -> bool:
        """Whether predicted damages are known."""
        return any(row.damage is not None for row in self.rows)

    @property
    def has_cost(self) -> bool:
        """Whether shares of the cost are known."""
        return any(row.cost_share is not None for row in self.rows)


def of_table(table: Sequence[OpSummary]) -> BitMap:
    """Return the map of a best plan from its op table."""
    rows = [
        BitRow(
            name=op.name,
            choice=op.choice,
            weight_bits=None if op.parameters == 0 else bits_of("W", op.choice),
            input_bits=bits_of("A", op.choice),
            damage=op.predicted_damage,
            cost_share=op.cost_share,
            summary=op,
        )
        for op in table
    ]
    return _with_widths(rows)


def of_plan(
    ops: Ops, options: Options, table: Sequence[OpSummary] = (), total: float | None = None
) -> BitMap:
    """Return the map of any plan of a study.

    Damages come from the study's `options`. Where the best plan's op table is known, an op's cost
    follows from it by the widths of its operands; `total` is the plan's own cost in bit operations.
    """
    known = {op.name: op for op in table}
    rows = []
    for name, config in ops.items():
        choice = label(config)
        summary = known.get(name)
        rows.append(
            BitRow(
                name=name,
                choice=choice,
                weight_bits=bits_of("W", choice) if _has_weight(name, options, choice) else None,
                input_bits=bits_of("A", choice),
                damage=_damage(options.get(name, {}), config, choice),
                cost_share=_share(summary, choice, total),
                is_estimate=True,
                summary=summary,
            )
        )
    return _with_widths(rows)


def _has_weight(name: str, options: Options, choice: str) -> bool:
    found = [bool(o["config"].get("weight")) for o in options.get(name, {}).values()]
    return any(found) or "W" in choice


def _damage(
    options: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], choice: str
) -> float | None:
    if not options:
        return None
    if choice == "FP32":
        return 0.0
    wanted = json.dumps(config, sort_keys=True)
    for option in options.values():
        if json.dumps(option["config"], sort_keys=True) == wanted:
            return float(option["damage"])
    return None


def _share(summary: OpSummary | None, choice: str, total: float | None) -> float | None:
    if summary is None or not total:
        return None
    return summary.bops * _product(choice, summary) / _product(summary.choice, summary) / total


def _product(choice: str, op: OpSummary) -> float:
    """Return bits × bits of an op's two operands under this choice."""
    inputs = bits_of("A", choice)
    return float(inputs * (bits_of("W", choice) if op.parameters else inputs))


def _with_widths(rows: Sequence[BitRow]) -> BitMap:
    damages = [row.damage for row in rows if row.damage is not None and math.isfinite(row.damage)]
    worst = max(damages, default=0.0)
    dearest = max((row.cost_share or 0.0 for row in rows), default=0.0)
    return BitMap(
        tuple(
            replace(
                row,
                damage_width=_ratio(row.damage, worst),
                cost_width=_ratio(row.cost_share, dearest),
            )
            for row in rows
        )
    )


def _ratio(value: float | None, largest: float) -> float:
    return min(max(value or 0.0, 0.0) / largest, 1.0) if largest > 0 else 0.0
