"""What an option costs: the objective, and a little of the other cost."""

from collections.abc import Mapping, Sequence

from tuner.config import COST_OF_OBJECTIVE
from tuner.costs import CostModel
from tuner.latency import LatencyModel
from tuner.ops import Op
from tuner.schemes import OpConfig

_TIE_BREAK = 1e-3
"""The weight of the other cost beside the objective, both as shares of FP32: what costs nothing in
the objective (an embedding in bops, an activation in size) is still worth quantizing."""


class Price:
    """The cost that strategies minimise, in units of the objective."""

    def __init__(self, costs: CostModel, objective: str, latency: LatencyModel | None) -> None:
        total = costs.costs({}).to_dict()
        if latency is not None:
            total |= {"latency_ms": latency.baseline.latency_ms}
        self._costs = costs
        self._latency = latency
        self.weights = _weights(total, objective)
        self.whole = sum(weight * total[name] for name, weight in self.weights.items())

    def of(self, members: Sequence[Op], configs: Mapping[str, OpConfig]) -> float:
        """Return the cost of tied ops together; their weight counts once."""
        bops = sum(self._costs.bops(op, configs[op.name]) for op in members)
        weights = {ref.key: (ref, configs[op.name].weight) for op in members for ref in op.weights}
        size = sum(self._costs.weight_bytes(ref, scheme) for ref, scheme in weights.values())
        for op in members:
            size += self._costs.activation_bytes(op, configs[op.name])
            size += self._costs.bias_bytes(op, configs[op.name])
        found = {"bops": float(bops), "size_bytes": float(size)}
        if self._latency is not None:
            times = (self._latency.option_ms(op, configs[op.name]) for op in members)
            found["latency_ms"] = sum(times)
        return sum(weight * found[name] for name, weight in self.weights.items())


def _weights(total: Mapping[str, float], objective: str) -> dict[str, float]:
    """Return what a unit of each cost counts: the objective 1, the other cost a thousandth."""
    lead = COST_OF_OBJECTIVE[objective]
    if lead == "bops" and not total["bops"]:
        lead = "size_bytes"
    other = "size_bytes" if lead == "bops" else "bops"
    return {lead: 1.0, other: _TIE_BREAK * total[lead] / max(total[other], 1.0)}
