"""Networks written as a function of their modules, and the chains that are found in them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tuner.graph import OpGraph
from tuner.model import InstrumentedModel
from tuner.recovery.chains import Chain, find_chains
from tuner.recovery.folding import find_pairs, fold


class Net(nn.Module):
    """A network that computes `run(self, x)` with its modules."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def recorded(net: nn.Module, x: Tensor) -> tuple[InstrumentedModel, OpGraph]:
    """Return an instrumented network and the graph of one forward."""
    model = InstrumentedModel(net)
    graph = model.record(lambda: net(x), max(x.shape[0], 1))
    model.ops = graph.ops
    return model, graph


def chains_of(net: nn.Module, x: Tensor, folds: bool = True, fixed: tuple[str, ...] = ()) -> Any:
    """Return (instrumented network, its chains), batch norms folded first."""
    model, graph = recorded(net, x)
    pairs = find_pairs(net, graph) if folds else []
    model.weights.replace_originals(fold(net, pairs))
    return model, find_chains(net, graph, [pair.norm for pair in pairs], fixed)


def names(chains: list[Chain]) -> list[tuple[str, ...]]:
    """Return producer and consumers of each chain."""
    return [(chain.producer, *sorted(chain.consumers)) for chain in chains]


def spread(net: nn.Module, seed: int = 0, largest: float = 30.0) -> nn.Module:
    """Multiply the output channels of all layers and norms by very different numbers."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        weight = module._parameters.get("weight")
        if weight is None or isinstance(module, nn.PReLU):
            continue
        factors = largest ** torch.rand(weight.shape[0], generator=generator)
        weight.data *= factors.view(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)
        bias = module._parameters.get("bias")
        if bias is not None and bias.shape == factors.shape:
            bias.data *= factors.to(bias.dtype)
    return net
