"""Batch norm in eval mode, folded into the convolution or linear layer before it.

W' = W · γ/√(σ² + ε), b' = (b − μ) · γ/√(σ² + ε) + β (Jacob et al., CVPR 2018, section 3.2).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuner.errors import PlanError
from tuner.graph import Node, OpGraph
from tuner.recovery.layers import on_output_channels
from tuner.subclasses import Variant, set_class

_FOLDABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True)
class FoldedPair:
    """The paths of a layer and of the batch norm that was folded into it."""

    layer: str
    norm: str


def find_pairs(model: nn.Module, graph: OpGraph) -> list[FoldedPair]:
    """Return the batch norms that can be folded, found on the recorded graph.

    The layer's output goes to this norm alone, the norm takes nothing else, and the layer shares
    its weights with no other op.
    """
    by_scope: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.function == "batch_norm" and node.op is None:
            by_scope.setdefault(node.scope, []).append(node)
    pairs = []
    for norm, nodes in by_scope.items():
        layer = _layer_before(graph, nodes)
        if layer is not None and _foldable(model, graph, layer, norm):
            pairs.append(FoldedPair(layer, norm))
    return pairs


def _layer_before(graph: OpGraph, norms: Sequence[Node]) -> str | None:
    """Return the one op that feeds all these calls of a norm, and nothing but them."""
    producers = [n.inputs[0] if n.inputs else -1 for n in norms]
    layers = {graph.nodes[i].op if i >= 0 else None for i in producers}
    if len(layers) != 1:
        return None
    (layer,) = layers
    calls = [node for node in graph.nodes if layer is not None and node.op == layer]
    taken = {node.index for node in norms}
    for call in calls:
        consumers = {node.index for node in graph.consumers(call.index)}
        if not consumers or consumers - taken or call.index in graph.outputs:
            return None
    return layer if calls else None


def _foldable(model: nn.Module, graph: OpGraph, layer_path: str, norm_path: str) -> bool:
    try:
        layer, norm = model.get_submodule(layer_path), model.get_submodule(norm_path)
    except AttributeError:
        return False
    if not isinstance(layer, _FOLDABLE) or not isinstance(norm, _BatchNorm):
        return False
    if type(norm).forward is not _BatchNorm.forward or "forward" in norm.__dict__:
        return False  # it does more than normalise
    op = graph.ops[layer_path]
    shared = [o for o in graph.ops.values() if {r.path for r in o.weights} & {op.weights[0].path}]
    if len(shared) > 1 or norm.running_mean is None or norm.training:
        return False
    if isinstance(layer, nn.Linear) and len(op.output_shape) != 2:
        return False
    return not (layer._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks)


def fold(model: nn.Module, pairs: Iterable[FoldedPair]) -> dict[str, Tensor]:
    """Fold each norm into its layer, in place; return the layers' new weights by parameter name."""
    changed = {}
    for pair in pairs:
        layer, norm = model.get_submodule(pair.layer), model.get_submodule(pair.norm)
        assert isinstance(norm, _BatchNorm)
        weight, bias = _folded(layer, norm)
        prepare(model, [pair])
        assert isinstance(layer.bias, Tensor)
        layer.bias.data = bias
        changed[f"{pair.layer}.weight" if pair.layer else "weight"] = weight
    return changed


def prepare(model: nn.Module, pairs: Iterable[FoldedPair]) -> None:
    """Give each layer a bias and make each norm an identity, the values left to come."""
    for pair in pairs:
        try:
            layer, norm = model.get_submodule(pair.layer), model.get_submodule(pair.norm)
        except AttributeError as error:
            raise PlanError(
                f"{pair.layer!r} and {pair.norm!r} were folded, but this model lacks one of them: "
                "it is a plan for another architecture"
            ) from error
        if not isinstance(layer, _FOLDABLE) or not isinstance(norm, _BatchNorm):
            raise PlanError(
                f"{pair.layer!r} and {pair.norm!r} were folded, but are a {type(layer).__name__} "
                f"and a {type(norm).__name__} here: it is a plan for another architecture"
            )
        if layer.bias is None:
            zeros = layer.weight.new_zeros(norm.num_features)
            layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
        set_class(norm, _FOLDED.of(type(norm)))
        norm.__dict__["folded_into"] = pair.layer


def folded_names(model: nn.Module, pairs: Iterable[FoldedPair]) -> set[str]:
    """Return the names of parameters and buffers that folding made needless."""
    names = set()
    for pair in pairs:
        norm = model.get_submodule(pair.norm)
        own = [*norm._parameters, *norm._buffers]
        names |= {f"{pair.norm}.{name}" if pair.norm else name for name in own}
    return names


def _folded(layer: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    mean = norm.running_mean.detach().double()
    start = torch.zeros_like(mean) if bias is None else torch.as_tensor(bias).detach().double()
    shift = (start - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    shaped = on_output_channels(layer, weight.detach().double(), scale)
    return shaped.to(weight.dtype), shift.to(weight.dtype)


def _identity(self: Any, x: Tensor) -> Tensor:
    return x


def _describe(self: Any) -> str:
    return f"folded into {self.folded_into}"


_FOLDED = Variant("folded", {"forward": _identity, "extra_repr": _describe})
