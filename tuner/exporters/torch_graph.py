"""Rewrites a traced graph into the spelling that PyTorch's compiler makes integer kernels of."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from tuner.exporters.agreement import Run
from tuner.exporters.saturation import LARGEST, is_depthwise
from tuner.exporters.torch_eager import saturates
from tuner.exporters.torch_forms import as_image, normalize, widen
from tuner.exporters.torch_fusion import flatten_layers
from tuner.exporters.torch_joining import join_layers
from tuner.exporters.torch_spelling import SpelledMarker, Speller, aten, copied, decomposed
from tuner.exporters.torch_values import (
    Int8Weight,
    int8_weight,
    static_codes,
    why_not_per_token,
)
from tuner.exporters.tracing import Traced, TracedWeight, is_marker
from tuner.quantizer import Quantizer

PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.scaled_dot_product_attention.default,
)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
_TURNING = (
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
)
_TAKES_TOKENS = (aten.linear.default, aten.matmul.default)


class Simulated(nn.Module):
    """Fake-quantizes as the simulation does: plain arithmetic, once it is traced."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self._quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Return x rounded."""
        return self._quantizer(x)


def spelled_graph(traced: Traced, bf16: bool = False) -> fx.GraphModule:
    """Return a copy of a traced graph with quantized values in the compiler's spelling.

    With `bf16`, products that are not computed with integers are computed in bfloat16.
    """
    module = copied(traced.module)
    normalize(module)
    by_name = {node.name: node for node in module.graph.nodes}
    weights: set[fx.Node] = set()
    for index, weight in enumerate(traced.weights):
        nodes = [by_name[name] for name in weight.nodes]
        weights.update(_spell_weight(module, f"weight_{index}", weight, nodes, traced))
    for node in _markers(module):
        _spell_activation(module, node, traced.quantizers[str(node.args[1])], weights)
    for node in list(module.graph.nodes):
        if node.target in _CONVOLUTIONS and _is_integer(node):
            widen(module, node)
            if node.target is aten.conv1d.default:
                as_image(module, node)
    join_layers(module, _quantized_layers(module))
    flatten_layers(module, _quantized_layers(module))
    if bf16:
        _lower_to_bf16(module)
    return _cleaned(module)


def float_graph(traced: Traced, bf16: bool = False) -> fx.GraphModule:
    """Return a copy of a traced graph without quantization of activations: the FP32 model.

    Its weights have the values of the simulation, which takes as long.
    """
    module = copied(traced.module)
    for node in _markers(module):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    if bf16:
        _lower_to_bf16(module)
    return _cleaned(module)


def eager(traced: Traced) -> Run:
    """Return what runs the model in FP32, op by op."""
    graph = float_graph(traced)
    return torch.no_grad()(lambda inputs: graph(*inputs))


def integer_products(module: fx.GraphModule) -> int:
    """Count the products whose both sides are dequantized codes: each should get a kernel."""
    return sum(_is_integer(node) for node in module.graph.nodes)


def overflowing(traced: Traced) -> set[str]:
    """Return the ops that are computed in float, as integer kernels of this CPU would overflow."""
    found: set[str] = set()
    if not saturates():
        return found
    by_name = {node.name: node for node in traced.module.graph.nodes}
    for weight in traced.weights:
        codes = int8_weight(weight)
        users = (user for name in weight.nodes for user in by_name[name].users)
        if codes is not None and any(_would_overflow(user, codes, traced) for user in users):
            found.update(weight.ops)
    return found


def changed_before(traced: Traced) -> set[str]:
    """Return the ops whose quantized input another op changes before they multiply it, as padding
    does: no integer kernel reads what that gives.
    """
    by_name = {node.name: node for node in traced.module.graph.nodes}
    found: set[str] = set()
    for weight in traced.weights:
        products = [user for name in weight.nodes for user in _products(by_name[name])]
        if products and not any(_reads_marker(product) for product in products):
            found.update(weight.ops)
    return found


def _products(weight: fx.Node) -> Iterator[fx.Node]:
    """Yield the products that read a weight, as it is or turned."""
    for user in weight.users:
        if user.target in _TURNING:
            yield from _products(user)
        elif user.target in PRODUCTS:
            yield user


def _reads_marker(user: fx.Node) -> bool:
    """Whether a weight's user is a product with quantized activations: a kernel's, of int8."""
    return any(is_marker(operand) for operand in user.all_input_nodes)


def _markers(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if is_marker(node)]


def _spell_weight(
    module: fx.GraphModule, name: str, weight: TracedWeight, nodes: list[fx.Node], traced: Traced
) -> Iterator[fx.Node]:
    """Put int8 codes in a weight's place at each of its uses; yield those that kernels can take."""
    codes = int8_weight(weight)
    if codes is None:
        return
    pairs = [(node, user) for node in nodes for user in node.users]
    if not pairs:
        return
    halves = codes.fits_four_bits and not any(_reads_marker(user) for _, user in pairs)
    stored = codes.packed() if halves else codes.codes
    constant = Speller(module, nodes[0]).constant(f"{name}_codes", stored)
    for node, user in pairs:
        speller = Speller(module, user)
        if user.target is aten.embedding.default and not codes.is_transposed:
            look_up = speller.packed_rows if halves else speller.rows
            user.replace_all_uses_with(look_up(name, constant, codes, user))
            continue
        if halves:
            user.replace_input_with(node, speller.unpacked(name, constant, codes))
            continue
        in_float = _would_overflow(user, codes, traced)
        value = speller.weight(name, constant, codes, in_float)
        user.replace_input_with(node, value)
        if codes.groups == 1 and not in_float:
            yield value


def _would_overflow(product: fx.Node, weight: Int8Weight, traced: Traced) -> bool:
    """Whether integer kernels of this CPU overflow in a product, which is float therefore."""
    if product.target in _TURNING:
        return any(_would_overflow(user, weight, traced) for user in product.users)
    markers = [operand for operand in product.all_input_nodes if is_marker(operand)]
    shape = weight.codes.shape
    groups = product.args[6] if len(shape) > 2 and len(product.args) > 6 else 1
    assert isinstance(groups, int)
    if not markers or is_depthwise(shape, shape[1] * groups):
        return False
    codes = static_codes(traced.quantizers[str(markers[0].args[1])])
    largest = LARGEST if codes is None else codes.high
    return weight.overflows(largest) and saturates()


def _spell_activation(
    module: fx.GraphModule, node: fx.Node, quantizer: Quantizer, weights: set[fx.Node]
) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    static = static_codes(quantizer)
    if static is not None:
        marker = SpelledMarker(node.name, str(node.args[1]), static)
        node.replace_all_uses_with(Speller(module, node).static(x, marker))
        return
    if why_not_per_token(quantizer.scheme) is None:
        for user in list(node.users):
            if user.target in _TAKES_TOKENS and user.args[0] is node and user.args[1] in weights:
                _spell_tokens(module, x, user, quantizer)
    if node.users:
        name = "simulated_" + "".join(c if c.isalnum() else "_" for c in str(node.args[1]))
        spelled = Speller(module, node).module(name, Simulated(quantizer), x)
        node.replace_all_uses_with(spelled)


def _spell_tokens(
    module: fx.GraphModule, x: fx.Node, product: fx.Node, quantizer: Quantizer
) -> None:
    """Multiply codes, and scale each token's sums after that."""
    speller = Speller(module, product)
    codes, scale = speller.tokens(x, quantizer.scheme)
    sums = speller.call(product.target, codes, product.args[1])
    result = speller.call(aten.mul.Tensor, sums, scale)
    bias = product.args[2] if len(product.args) > 2 else product.kwargs.get("bias")
    if bias is not None:
        result = speller.call(aten.add.Tensor, result, bias)
    product.replace_all_uses_with(result)


def _is_integer(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in PRODUCTS:
        return False
    left, right = _operands(node)
    while right is not None and right.target is aten.t.default:
        right = _first(right)
    return (
        left is not None
        and right is not None
        and left.target is decomposed.dequantize_per_tensor.default
        and right.target is decomposed.dequantize_per_channel.default
    )


def _is_quantized(layer: fx.Node) -> bool:
    """Whether a layer is computed with integers, of what is quantized by a known scale."""
    if not _is_integer(layer):
        return False
    codes = _first(layer.args[0])  # type: ignore[arg-type]
    return codes is not None and codes.target is decomposed.quantize_per_tensor.default


def _quantized_layers(module: fx.GraphModule) -> list[fx.Node]:
    layers = module.graph.find_nodes(op="call_function", target=aten.linear.default)
    return [node for node in layers if _is_quantized(node)]


def _operands(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    start = 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0
    left, right = node.args[start : start + 2]
    return (
        left if isinstance(left, fx.Node) else None,
        right if isinstance(right, fx.Node) else None,
    )


def _first(node: fx.Node) -> fx.Node | None:
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _lower_to_bf16(module: fx.GraphModule) -> None:
    products = [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and node.target in PRODUCTS and not _is_integer(node)
    ]
    for node in products:
        speller = Speller(module, node)
        lowered = {
            operand: speller.call(aten.to.dtype, operand, torch.bfloat16)
            for operand in node.all_input_nodes
            if _is_float(operand)
        }
        users = list(node.users)
        raised = Speller(module, node.next).call(aten.to.dtype, node, torch.float32)
        for operand, lower in lowered.items():
            node.replace_input_with(operand, lower)
        for user in users:
            user.replace_input_with(node, raised)


def _is_float(node: fx.Node) -> bool:
    """Whether a node is a float tensor; what was written here has no example value, and is."""
    value = node.meta.get("val")
    return value is None or (isinstance(value, Tensor) and value.dtype == torch.float32)


def _cleaned(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return module
