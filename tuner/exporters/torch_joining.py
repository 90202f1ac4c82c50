"""Makes one product of layers that read the same codes, as queries, keys and values do.

A kernel's call costs some 30 µs beside its products, and wider products are faster ones. Only
layers whose outputs are split into heads are joined: these become views of the joint output, and no
function or quantizer waits for them that would have gone into a kernel of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor, fx

from tuner.exporters.torch_spelling import Speller, aten, decomposed

_SPLITS = (aten.view.default, aten.reshape.default, aten.unflatten.int)


def join_layers(module: fx.GraphModule, layers: Iterable[fx.Node]) -> None:
    """Join the layers that can be; `layers` are `aten.linear` nodes of dequantized codes."""
    groups: dict[object, list[fx.Node]] = {}
    for layer in layers:
        if _has_plain_weight(layer) and _is_split(layer):
            groups.setdefault((_codes(layer), _bias(layer) is None), []).append(layer)
    for group in groups.values():
        if len(group) > 1:
            _join(module, group)


def _codes(layer: fx.Node) -> tuple[object, ...]:
    """Return what tells the codes that a layer reads: of one tensor, rounded in the same way."""
    restored = _node(layer.args[0])
    quantized = _node(restored.args[0])
    source = _node(quantized.args[0])
    clamped = source.args if source.target is aten.clamp.default else (source,)
    return *clamped, *quantized.args[1:]


def _join(module: fx.GraphModule, layers: Sequence[fx.Node]) -> None:
    """Put views of one product in the places of several."""
    speller = Speller(module, layers[0])
    weights = [_node(layer.args[1]) for layer in layers]
    name = f"{_node(weights[0].args[0]).target}_joined"
    constants = []
    for index, what in enumerate(("codes", "scale", "zero_point")):
        whole = _whole(module, (weight.args[index] for weight in weights))
        constants.append(speller.constant(f"{name}_{what}", whole))
    weight = speller.call(weights[0].target, *constants, *weights[0].args[3:])
    arguments = [layers[0].args[0], weight]
    if _bias(layers[0]) is not None:
        biases = _whole(module, (_bias(layer) for layer in layers))
        arguments.append(speller.constant(f"{name}_bias", biases))
    joined = speller.call(layers[0].target, *arguments)
    values = [layer.meta["val"] for layer in layers]
    with values[0].fake_mode:
        joined.meta["val"] = torch.cat(values, -1)
    for layer, (start, stop) in zip(layers, _parts(values), strict=True):
        part = speller.call(aten.slice.Tensor, joined, -1, start, stop)
        part.meta.update(layer.meta)
        layer.replace_all_uses_with(part)
    for layer in layers:
        module.graph.erase_node(layer)


def _parts(values: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    start = 0
    for value in values:
        stop = start + int(value.shape[-1])
        yield start, stop
        start = stop


def _whole(module: fx.GraphModule, constants: Iterable[object]) -> Tensor:
    return torch.cat([attrgetter(str(_node(each).target))(module).detach() for each in constants])


def _has_plain_weight(layer: fx.Node) -> bool:
    """Whether weight and bias are constants, with a scale for each row."""
    weight, bias = _node(layer.args[1]), _bias(layer)
    if weight.target is not decomposed.dequantize_per_channel.default:
        return False
    constants = (*weight.args[:3], *([] if bias is None else [bias]))
    return all(isinstance(each, fx.Node) and each.op == "get_attr" for each in constants)


def _bias(layer: fx.Node) -> object:
    return layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")


def _is_split(layer: fx.Node) -> bool:
    """Whether all that is done with an output is to split its last axis."""
    return bool(layer.users) and all(_splits_last_axis(user, layer) for user in layer.users)


def _splits_last_axis(user: fx.Node, layer: fx.Node) -> bool:
    if user.target not in _SPLITS or user.args[0] is not layer:
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # sympy, slow, of torch

    before, after = layer.meta["val"].shape[:-1], user.meta["val"].shape
    return len(after) > len(before) + 1 and all(
        statically_known_true(one == other) for one, other in zip(before, after, strict=False)
    )


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
