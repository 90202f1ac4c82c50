"""Where a layer's input channels can be scaled for free: the layer or norm before it takes it back.

If f(s·x) = s·f(x) for every s > 0 — ReLU, max and average pooling, dropout, reshaping — then
W₂ f(W₁ x + b₁) = (W₂ S) f(S⁻¹ W₁ x + S⁻¹ b₁) with S = diag(s) (Nagel et al., ICCV 2019, section
4.1). A norm with a weight and a bias for each channel stands for W₁, b₁ as well.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tuner.graph import Node, OpGraph
from tuner.ops import Op
from tuner.recovery.absorption import Offset, offset_between
from tuner.recovery.layers import input_channels, output_axis, output_channels

_HOMOGENEOUS = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "dropout", "dropout_"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("interpolate", "contiguous", "flatten", "view", "reshape", "squeeze", "unsqueeze"),
    }
)
"""Functions that pass a positive factor of a channel on, and leave the order of channels."""

_RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze", "mean"})
"""Those after which the channels may lie along another axis, counted from the end."""

_TYPES = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm, nn.Hardtanh),
)
_FORWARDS = frozenset(kind.forward for kind in _TYPES)
"""What a module computes is known where its forward is one of these."""

_NORMS = ("batch_norm", "group_norm", "rms_norm", "LayerNorm")
_CAPPED = ("hardtanh", "relu6")


@dataclass(frozen=True)
class Chain:
    """A producer, the ops that alone consume its output, and what lies between them.

    All are module paths; `channels` is the number of factors. `caps` are the ReLU6 modules between:
    their upper end is divided as the producer's output is. `offset` says which constants the biases
    of the consumers can take over from the channels.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: int
    caps: tuple[str, ...] = ()
    offset: Offset = field(default="none", compare=False)


def find_chains(
    model: nn.Module, graph: OpGraph, folded: Iterable[str], fixed: Iterable[str] = ()
) -> list[Chain]:
    """Return the chains of a recorded graph, in execution order.

    `folded` are the batch norms that are identities now; the `fixed` ops must see their tensors as
    they are, because these are quantized by ranges that do not follow.
    """
    return list(_Finder(model, graph, frozenset(folded), frozenset(fixed)).chains())


class _Finder:
    def __init__(
        self, model: nn.Module, graph: OpGraph, folded: frozenset[str], fixed: frozenset[str]
    ) -> None:
        self._modules = dict(model.named_modules())
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._tied = frozenset(key for key, count in uses.items() if count > 1)
        self._graph = graph
        self._folded = folded
        self._fixed = fixed
        self._followers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for index in set(node.inputs):
                self._followers.setdefault(index, []).append(node)

    def chains(self) -> Iterator[Chain]:
        """Yield every chain whose channels can be scaled."""
        by_producer: dict[str, list[Node]] = {}
        for node in self._graph.nodes:
            if (path := self._producer(node)) is not None:
                by_producer.setdefault(path, []).append(node)
        for path, nodes in by_producer.items():
            if (chain := self._chain(path, nodes)) is not None:
                yield chain

    def _producer(self, node: Node) -> str | None:
        """Return the module that makes this node's output, if its channels can be scaled."""
        path = node.scope if node.op is None else node.op
        module = self._modules.get(path)
        if path in self._fixed or module is None or not self._is_plain(module):
            return None
        if node.function in _NORMS and path not in self._folded:
            return path if _norm_channels(module) else None
        op = self._graph.ops.get(path)
        return path if op is not None and self._has_own_weight(op, module) else None

    def _has_own_weight(self, op: Op, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear | _ConvNd) or not op.weights:
            return False
        used = [o for o in self._graph.ops.values() for ref in o.weights if _same(ref, op)]
        return len(used) == 1

    def _chain(self, path: str, nodes: list[Node]) -> Chain | None:
        reached: set[int] = set()
        reshaped: set[int] = set()
        consumers: dict[str, None] = {}
        caps: dict[str, None] = {}
        functions: set[str] = set()
        waiting = [node.index for node in nodes]
        while waiting:
            index = waiting.pop()
            reached.add(index)
            followers = self._followers.get(index, [])
            if not followers or index in self._graph.outputs:
                return None
            for node in followers:
                if self._consumes(node, index):
                    consumers[node.op or ""] = None
                elif self._passes(node) and not (_is_cap(node) and index in reshaped):
                    waiting.append(node.index)
                    functions.add(node.function)
                    caps.update({node.scope: None} if _is_cap(node) else {})
                    if index in reshaped or node.function in _RESHAPES:
                        reshaped.add(node.index)
                else:
                    return None
        channels = self._channels(path)
        names = tuple(consumers)
        if not names or not all(self._takes(name, channels, reached) for name in names):
            return None
        capped = [node for node in self._graph.nodes if node.scope in caps and node.op is None]
        if any(node.index not in reached for node in capped):  # one ReLU6 for several layers
            return None
        if caps and output_axis(self._modules[path]) is None:
            return None
        offset = self._offset(path, names, functions)
        return Chain(path, names, channels, tuple(caps), offset)

    def _offset(self, path: str, names: tuple[str, ...], functions: set[str]) -> Offset:
        """Return what may be taken from the channels: nothing where consumers see other tensors."""
        taken = {name: {n.inputs for n in self._graph.nodes if n.op == name} for name in names}
        if any(inputs != taken[names[0]] for inputs in taken.values()):
            return "none"
        consumers = [self._modules[name] for name in names]
        return offset_between(self._modules[path], consumers, functions)

    def _consumes(self, node: Node, index: int) -> bool:
        """Return whether a node is an op of its own module that takes the tensor as its input."""
        if node.op is None or node.op not in self._modules or node.op in self._fixed:
            return False
        op, module = self._graph.ops.get(node.op), self._modules[node.op]
        is_layer = op is not None and self._has_own_weight(op, module)
        plain = self._is_plain(module) and not module._forward_pre_hooks
        return is_layer and plain and node.inputs == (index,)

    def _passes(self, node: Node) -> bool:
        if node.op is not None:
            return False
        if node.function in _HOMOGENEOUS or node.function == "batch_norm":
            return node.function != "batch_norm" or node.scope in self._folded
        module = self._modules.get(node.scope)
        is_relu6 = (
            isinstance(module, nn.Hardtanh) and module.min_val == 0 and self._is_plain(module)
        )
        return node.function in _CAPPED and is_relu6

    def _takes(self, name: str, channels: int, reached: set[int]) -> bool:
        """Return whether all calls of an op take what was reached, channel by channel."""
        calls = [node for node in self._graph.nodes if node.op == name]
        wide = input_channels(self._modules[name])
        repeats = wide // channels if channels else 0
        fits = repeats * channels == wide and repeats >= 1
        flat = repeats == 1 or isinstance(self._modules[name], nn.Linear)
        return fits and flat and all(node.inputs[0] in reached for node in calls)

    def _is_plain(self, module: nn.Module) -> bool:
        """Return whether a module is its torch class's, unwatched, with parameters of its own."""
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        looked_at = module._forward_hooks or "forward" in module.__dict__
        return not (looked_at or own & self._tied) and type(module).forward in _FORWARDS

    def _channels(self, path: str) -> int:
        module = self._modules[path]
        return _norm_channels(module) or output_channels(module)


def _norm_channels(module: nn.Module) -> int:
    """Return how many channels a norm scales one by one, 0 where it scales none."""
    if not isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _BatchNorm):
        return 0
    weight = module._parameters.get("weight")
    return weight.numel() if weight is not None and weight.dim() == 1 else 0


def _is_cap(node: Node) -> bool:
    return node.function in _CAPPED


def _same(ref: object, op: Op) -> bool:
    return getattr(ref, "path", None) == op.weights[0].path
