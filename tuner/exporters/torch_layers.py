"""Compares each quantized tensor of a spelled graph with the simulation, alone.

The graph runs with oneDNN's integer kernels, those that compiled code calls. Where it quantizes,
its codes are compared with the simulated ones, and these go on: no difference grows from layer to
layer.
"""

from typing import Any

import torch
from torch import Tensor, fx

from tuner.exporters.agreement import output_steps
from tuner.exporters.report import LayerAgreement
from tuner.exporters.torch_eager import with_integer_kernels
from tuner.exporters.torch_spelling import SPELLED, SpelledMarker
from tuner.exporters.tracing import Simulation, Traced


@torch.no_grad()
def layer_agreement(traced: Traced, graph: fx.GraphModule) -> tuple[LayerAgreement, ...]:
    """Return how far every tensor of codes is from the simulation, in order of execution.

    The model's outputs come last: a step of theirs is 1/127 of their largest magnitude.
    """
    simulation = traced.simulation()
    expected = simulation.run(*traced.example.tensors)
    forced = _Forced(with_integer_kernels(graph), traced, simulation)
    found = forced.run(*traced.example.tensors)
    return (
        *forced.layers.values(),
        *output_steps(traced, expected, found),
    )


class _Forced(fx.Interpreter):
    """Runs a graph, with simulated codes in the place of its own."""

    def __init__(self, module: fx.GraphModule, traced: Traced, simulation: Simulation) -> None:
        super().__init__(module)
        self._quantizers = traced.quantizers
        self._simulation = simulation
        self.layers: dict[str, LayerAgreement] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; of one that quantizes, compare what it gives."""
        found = super().run_node(n)
        marker = n.meta.get(SPELLED)
        if marker is None:
            return found
        codes = self._codes(marker).reshape(found.shape)
        if codes.numel():
            self._keep(marker.key, (found.int() - codes.int()).abs())
        return codes

    def _keep(self, key: str, steps: Tensor) -> None:
        """Keep how far codes are apart, of a quantizer that is used more than once the worst."""
        equal = (steps == 0).double().mean().item()
        layer = LayerAgreement(key, float(steps.max()), equal)
        known = self.layers.get(key)
        if known is None or (layer.max_steps, -layer.equal) > (known.max_steps, -known.equal):
            self.layers[key] = layer

    def _codes(self, marker: SpelledMarker) -> Tensor:
        """Return the codes of simulated values."""
        values = self._quantizers[marker.key](self._simulation.reached[marker.node])
        codes = torch.round(values.double() / marker.codes.scale) + marker.codes.zero_point
        return codes.to(torch.uint8)
