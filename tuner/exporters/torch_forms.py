"""Brings products into the forms that PyTorch's compiler has right integer kernels for."""

from typing import Any

import torch
from torch import fx

from tuner.exporters.torch_spelling import Speller, aten

_PADDED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_SCALED = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}


def normalize(module: fx.GraphModule) -> None:
    """Say by numbers how convolutions pad, in ops of their own how sums are weighted, and 2x.

    The compiler drops `alpha` and `beta` of products of integers, and fails at `x + x` behind one.
    Padding that is longer on one side is left as it is: such convolutions are computed in float.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _PADDED:
            _number_padding(node)
        elif _is_doubled(node):
            factor: Any = node.kwargs.get("alpha", 1)
            node.target, node.args, node.kwargs = aten.mul.Tensor, (node.args[0], 1 + factor), {}
        elif node.target in _SCALED and {"alpha", "beta"} & set(node.kwargs):
            _weigh(module, node)


def _is_doubled(node: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or node.args[0] is not node.args[1]:
        return False
    return bool(node.meta["val"].is_floating_point())


def widen(module: fx.GraphModule, node: fx.Node) -> None:
    """Give a convolution of one channel a second one of zeros.

    With one channel the compiler takes a tensor's memory for channels first, the integer kernel
    for channels last, where the batch is dynamic: it would compute on mixed up values.
    """
    quantized, restored, weight, codes = _operands(node)
    values = getattr(module, str(codes.target))
    if values.shape[1] != 1 or (len(node.args) > 6 and node.args[6] != 1):
        return
    speller = Speller(module, node)
    wider = torch.cat([values, torch.zeros_like(values)], dim=1)
    padding = [0, 0] * (values.dim() - 2) + [0, 1]
    x = speller.call(aten.constant_pad_nd.default, quantized.args[0], padding, 0.0)
    again = speller.call(quantized.target, x, *quantized.args[1:])
    node.update_arg(0, speller.call(restored.target, again, *restored.args[1:]))
    constant = speller.constant(f"{codes.target}_wider", wider)
    node.update_arg(1, speller.call(weight.target, constant, *weight.args[1:]))


def as_image(module: fx.GraphModule, node: fx.Node) -> None:
    """Compute a convolution along one axis as one of images of one row.

    Where another op is fused into an integer convolution along one axis, the compiler takes its
    result for as long as with a kernel of one value, and knows fewer activations.
    """
    quantized, restored, weight, codes = _operands(node)
    values = getattr(module, str(codes.target))
    speller = Speller(module, node)
    rows = speller.call(aten.unsqueeze.default, quantized, 2)
    x = speller.call(restored.target, rows, *restored.args[1:])
    constant = speller.constant(f"{codes.target}_rows", values.unsqueeze(2))
    kernel = speller.call(weight.target, constant, *weight.args[1:])
    bias, stride, padding, dilation, groups = _settings(node)
    found = speller.call(
        aten.conv2d.default, x, kernel, bias, [1, *stride], [0, *padding], [1, *dilation], groups
    )
    node.replace_all_uses_with(speller.call(aten.squeeze.dim, found, 2))


def _settings(node: fx.Node) -> tuple[Any, Any, Any, Any, Any]:
    """Return bias, stride, padding, dilation and groups of a convolution."""
    defaults = {"bias": None, "stride": [1], "padding": [0], "dilation": [1], "groups": 1}
    given = dict(zip(defaults, node.args[2:], strict=False)) | dict(node.kwargs)
    return tuple(given.get(name, default) for name, default in defaults.items())  # type: ignore[return-value]


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """Return the nodes that quantize x, dequantize x and the weight, and the codes of that."""
    restored, weight = node.args[:2]
    assert isinstance(restored, fx.Node)
    assert isinstance(weight, fx.Node)
    quantized, codes = restored.args[0], weight.args[0]
    assert isinstance(quantized, fx.Node)
    assert isinstance(codes, fx.Node)
    return quantized, restored, weight, codes


def _number_padding(node: fx.Node) -> None:
    kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    bias, stride, how, dilation, groups = _settings(node)
    stride, dilation = (
        list(given) * (len(kernel) if len(given) == 1 else 1) for given in (stride, dilation)
    )
    totals = [
        step * (size - 1) if how == "same" else 0  # "valid" is the default, which may be left out
        for step, size in zip(dilation, kernel, strict=True)
    ]
    if any(total % 2 for total in totals):
        return
    x, weight = node.args[:2]
    node.target = _PADDED[node.target]  # type: ignore[index]
    padding = [total // 2 for total in totals]
    node.args = x, weight, bias, stride, padding, dilation, groups
    node.kwargs = {}


def _weigh(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace `beta · bias + alpha · left @ right` by a product of its own, and a sum."""
    bias, left, right = node.args
    speller = Speller(module, node)
    found = speller.call(_SCALED[node.target], left, right)  # type: ignore[index]
    found.meta["val"] = node.meta["val"]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    result = speller.call(aten.mul.Tensor, found, alpha)
    if beta != 0:  # else what is in the bias, NaN too, counts for nothing
        result = speller.call(aten.add.Tensor, result, speller.call(aten.mul.Tensor, bias, beta))
    node.replace_all_uses_with(result)
