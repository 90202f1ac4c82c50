"""Spells masked attention so that ONNX Runtime computes it quickly, with the same outcome.

Its softmax takes exp(x - max) of what is hidden, however small x, for a denormal number: some seven
times as slow as any other. Here scores are never more than 64 below the largest of their row:
exp(-64) is less than 2e-28, nothing beside 1, and no denormal. Scores are hidden by a sum with a
bias that all layers share, rows without any visible score become 0 by a product: both are quicker
than a choice between two tensors. A factor of the scores goes into the scale of an operand.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tuner.exporters.onnx_activations import paired

_ATEN = torch.ops.aten
_SOFTMAX = (_ATEN.softmax.int, _ATEN._softmax.default)
_FILL = (_ATEN.masked_fill.Scalar, _ATEN.masked_fill_.Scalar)
_SUM = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_PRODUCT = (_ATEN.mul.Tensor, _ATEN.mul_.Tensor)
_MATRICES = (_ATEN.matmul.default, _ATEN.bmm.default)
_TURNS = (_ATEN.transpose.int, _ATEN.permute.default)
_HIDING = -1e4  # scores that anything so low is added to are hidden
_HIDDEN = -1e30
_DEPTH = 64.0
_FAR = 200


def speed_softmax_up(module: fx.GraphModule) -> None:
    """Rewrite every softmax over masked scores of a graph, in place."""
    _Softmaxes(module).rewrite()


class _Softmaxes:
    """Changes one graph; what is made of equal masks is made once."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._graph = module.graph
        self._numbers = _numbers(module.graph)
        self._made: dict[tuple[str, int], fx.Node] = {}

    def rewrite(self) -> None:
        """Rewrite all that the module's docstring tells of."""
        for node in list(self._graph.nodes):
            if node.target not in _SOFTMAX or not _is_over_rows(node):
                continue
            source: Any = node.args[0]
            if _hides(source):
                self._fold_scale(source.args[0])
                self._fill(node, source)
            elif source.target in _SUM and _is_masked(source):
                for scores in source.all_input_nodes:
                    self._fold_scale(scores)
                self._limit(node, source)

    def _fill(self, softmax: fx.Node, source: fx.Node) -> None:
        """Hide by a sum; fill rows in which everything is hidden by a product."""
        hidden: Any = source.args[1]
        bias = self._shared(source, hidden, "bias", _bias)
        hiding = self._call(source, torch.add, source.args[0], bias)
        source.replace_all_uses_with(hiding)
        self._graph.erase_node(source)
        self._limit(softmax, hiding)
        for fill in [user for user in softmax.users if self._empties(user, softmax, hidden)]:
            empty: Any = fill.args[1]
            kept = self._shared(fill, empty, "kept", _kept)
            product = self._call(fill, torch.mul, softmax, kept)
            fill.replace_all_uses_with(product)
            self._graph.erase_node(fill)

    def _limit(self, softmax: fx.Node, scores: fx.Node) -> None:
        softmax.replace_input_with(scores, self._call(softmax, _limited, scores))

    def _fold_scale(self, product: Any) -> None:
        """Multiply the floats of an operand of integers, not the scores, by a number."""
        if not isinstance(product, fx.Node) or product.target not in _PRODUCT:
            return
        matrix: Any = product.args[0]
        factor = product.args[1]
        is_plain = isinstance(matrix, fx.Node) and matrix.target in _MATRICES
        if not is_plain or not isinstance(factor, float) or len(matrix.users) > 1:
            return
        left, right = (_pair_behind(operand) for operand in matrix.args)
        if left is not None and right is not None:
            self._scale(right, factor)
            product.replace_all_uses_with(matrix)
            self._graph.erase_node(product)

    def _scale(self, pair: fx.Node, factor: float) -> None:
        """Let a pair of Quantize- and DequantizeLinear yield what it did times a factor."""
        _, scale, *_, name = pair.args
        assert isinstance(scale, fx.Node)
        value = operator.attrgetter(str(scale.target))(self._module)
        self._module.register_buffer(f"{name}_scale_out", value * factor)
        with self._graph.inserting_before(pair):
            pair.args = (*pair.args, self._graph.get_attr(f"{name}_scale_out"))

    def _empties(self, node: fx.Node, softmax: fx.Node, hidden: fx.Node) -> bool:
        """Whether a node fills rows with 0 in which everything is hidden."""
        if node.target not in _FILL or node.args[0] is not softmax or node.args[2] != 0:
            return False
        empty = node.args[1]
        if not isinstance(empty, fx.Node) or empty.target is not _ATEN.all.dim:
            return False
        source = empty.args[0]
        assert isinstance(source, fx.Node)
        is_same = self._numbers[source] == self._numbers[hidden]
        return is_same and tuple(empty.args[1:]) == (-1, True)

    def _shared(
        self, before: fx.Node, mask: fx.Node, what: str, make: Callable[[Tensor], Tensor]
    ) -> fx.Node:
        key = what, self._numbers[mask]
        if key not in self._made:
            self._made[key] = self._call(before, make, mask)
        return self._made[key]

    def _call(self, before: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        with self._graph.inserting_before(before):
            return self._graph.call_function(function, args)


def _bias(hidden: Tensor) -> Tensor:
    return torch.where(hidden, _HIDDEN, 0.0)


def _kept(empty: Tensor) -> Tensor:
    return torch.where(empty, 0.0, 1.0)


def _limited(scores: Tensor) -> Tensor:
    return torch.maximum(scores, scores.amax(-1, keepdim=True) - _DEPTH)


def _is_over_rows(softmax: fx.Node) -> bool:
    value = softmax.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    return softmax.args[1] in (-1, value.dim() - 1)


def _hides(node: Any) -> bool:
    is_fill = isinstance(node, fx.Node) and node.target in _FILL and len(node.users) == 1
    return is_fill and float(node.args[2]) <= _HIDING


def _is_masked(added: fx.Node) -> bool:
    """Whether one of two terms comes from numbers that hide."""
    terms = [term for term in added.args[:2] if isinstance(term, fx.Node)]
    return len(terms) == 2 and any(_is_mask(term) for term in terms if not _is_product(term))


def _is_product(node: fx.Node) -> bool:
    return node.target in (*_MATRICES, *_PRODUCT) and any(
        source.target in _MATRICES for source in (node, *node.all_input_nodes)
    )


def _is_mask(term: fx.Node) -> bool:
    """Whether numbers that hide are behind a tensor, or an input of the model."""
    for node in _behind(term):
        if node.op == "placeholder" and _is_float(node):
            return True
        if any(isinstance(arg, float) and arg <= _HIDING for arg in node.args):
            return True
        if node.op == "get_attr" and _is_low(node):
            return True
    return False


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    seen, todo = {node}, [node]
    while todo and len(seen) < _FAR:
        found = todo.pop()
        yield found
        new = [source for source in found.all_input_nodes if source not in seen]
        seen.update(new)
        todo += new


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_low(node: fx.Node) -> bool:
    value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    is_float = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0
    return is_float and value.amin().item() <= _HIDING


def _pair_behind(operand: Any) -> fx.Node | None:
    """Return the pair that only this operand reads, turned or not."""
    while isinstance(operand, fx.Node) and len(operand.users) == 1:
        if operand.target is paired:
            return operand
        if operand.target not in _TURNS:
            return None
        operand = operand.args[0]
    return None


def _numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """Number the nodes of a graph: those that compute the same from the same have one number."""
    written = {node.args[0] for node in graph.nodes if _writes(node)}
    known: dict[Any, int] = {}
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        signature: Any = node
        is_pure = node.op == "call_function" and not _writes(node)
        if is_pure and not written.intersection(node.all_input_nodes):
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{found[n]}")
            signature = str(node.target), str(arguments)
        found[node] = known.setdefault(signature, len(known))
    return found


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
