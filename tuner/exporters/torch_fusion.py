"""Spells layers over sequences as products of matrices, with what follows them in matrices too.

The compiler takes a bias, an activation function and the quantizer behind it into the kernel of a
product, but finds them only where nothing stands between: a layer over `[N, T, C]` becomes a
product of `[N · T, C]` and a view, and this view would hide what follows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from tuner.exporters.torch_spelling import Speller, aten

_FUNCTIONS = (
    aten.gelu.default,
    aten.relu.default,
    aten.silu.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.clamp.default,
    aten.dropout.default,
)


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A tensor as a matrix, and the lengths of the axes that became its rows."""

    node: fx.Node
    sizes: tuple[fx.Node, ...]


def flatten_layers(module: fx.GraphModule, layers: Iterable[fx.Node]) -> None:
    """Give each layer, of codes with one scale, a matrix; move views behind functions.

    `layers` are `aten.linear` nodes that read `dequantize(quantize(x))`, in order of execution.
    """
    matrices: dict[fx.Node, _Matrix] = {}
    for layer in layers:
        value = layer.meta.get("val")
        if value is not None and value.dim() > 2:
            matrix, view = _sunk(module, *_flat(module, layer, matrices))
            matrices[view] = matrix


def _flat(
    module: fx.GraphModule, layer: fx.Node, matrices: dict[fx.Node, _Matrix]
) -> tuple[_Matrix, fx.Node]:
    """Put a product of matrices in a layer's place; return it, and its view in the old shape."""
    speller = Speller(module, layer)
    restored = _node(layer.args[0])
    quantized = _node(restored.args[0])
    x = _node(quantized.args[0])
    known = matrices.get(x)
    if known is None:
        axes = range(layer.meta["val"].dim() - 1)
        sizes = tuple(speller.call(aten.sym_size.int, x, axis) for axis in axes)
        known = _Matrix(speller.call(aten.flatten.using_ints, x, 0, len(axes) - 1), sizes)
    codes = speller.call(quantized.target, known.node, *quantized.args[1:])
    codes.meta.update(quantized.meta)
    values = speller.call(restored.target, codes, *restored.args[1:])
    product = speller.call(layer.target, values, *layer.args[1:], **layer.kwargs)
    matrix = _Matrix(product, known.sizes)
    return matrix, _view(speller, matrix, layer)


def _sunk(module: fx.GraphModule, matrix: _Matrix, view: fx.Node) -> tuple[_Matrix, fx.Node]:
    """Move the view of a product behind the functions that are the only ones to read it."""
    while len(view.users) == 1:
        (user,) = view.users
        if user.target not in _FUNCTIONS:
            break
        speller = Speller(module, user)
        result = speller.call(user.target, matrix.node, *user.args[1:], **user.kwargs)
        matrix = _Matrix(result, matrix.sizes)
        view = _view(speller, matrix, user)
    return matrix, view


def _view(speller: Speller, matrix: _Matrix, old: fx.Node) -> fx.Node:
    """Put a matrix in an old node's place, in its shape."""
    shape = [*matrix.sizes, int(old.meta["val"].shape[-1])]
    view = speller.call(aten.view.default, matrix.node, shape)
    old.replace_all_uses_with(view)
    view.meta.update(old.meta)
    return view


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
