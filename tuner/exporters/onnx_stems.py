"""Spells a convolution of a few channels with a stride as one of many channels without.

Kernels for integers gather what a kernel covers channel by channel: of three channels, as images
have them, that takes longer than the products. Moved to blocks of s × s pixels (s is the stride),
a convolution of C channels and K × K weights is one of s²·C channels and ⌈K/s⌉ × ⌈K/s⌉ weights, the
new ones 0: the same sums of the same integers.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from tuner.exporters.onnx_activations import paired
from tuner.exporters.onnx_ops import CONV, DEQUANTIZE, QUANTIZE, TO_DEPTH
from tuner.exporters.onnx_weights import dequantized

_CONV = torch.ops.aten.conv2d.default
_DEFAULTS = (None, (1, 1), (0, 0), (1, 1), 1)
_MOST_CHANNELS = 4


def speed_stems_up(module: fx.GraphModule) -> None:
    """Rewrite such convolutions of images of integers, [N, C, H, W], in place."""
    for node in list(module.graph.nodes):
        if node.target is _CONV and _is_stem(node, module):
            _rewrite(node, module)


def _is_stem(node: fx.Node, module: fx.GraphModule) -> bool:
    pair, weight, _, stride, padding, dilation, groups = _arguments(node)
    if not (_is_only(pair, paired) and _is_only(weight, dequantized)):
        return False
    shape = pair.args[0].meta["val"].shape
    codes, zero = (_constant(module, weight.args[i]) for i in (0, 2))
    is_known = all(isinstance(length, int) for length in shape[1:]) and len(shape) == 4
    is_whole = codes.dtype == torch.int8 and not weight.args[6] and not bool(zero.any())
    is_plain = len(pair.args) == 6 and pair.args[4] is None and (*dilation, groups) == (1, 1, 1)
    is_strided = stride[0] == stride[1] > 1 and codes.shape[-1] > 1
    has_numbers = not isinstance(padding, str)
    is_small = codes.shape[1] <= _MOST_CHANNELS
    return is_known and is_whole and is_plain and is_strided and has_numbers and is_small


def _rewrite(node: fx.Node, module: fx.GraphModule) -> None:
    pair, weight, bias, (block, _), padding, *_ = _arguments(node)
    codes = _constant(module, weight.args[0])
    lengths = tuple(pair.args[0].meta["val"].shape[2:])
    margins = _margins(lengths, tuple(codes.shape[2:]), padding, block)
    module.register_buffer(str(weight.args[0].target), _in_blocks(codes, margins.shift, block))
    args = (*pair.args, margins.before, margins.after, block)
    with module.graph.inserting_before(node):
        moved = module.graph.call_function(paired_in_blocks, args)
        parts = (moved, weight, bias, margins.blocks_before, margins.blocks_after)
        new = module.graph.call_function(CONV, parts)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    module.graph.erase_node(pair)


def paired_in_blocks(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    codes: tuple[int, int] | None,
    values: None,
    name: str,
    before: tuple[int, int],
    after: tuple[int, int],
    block: int,
) -> Tensor:
    """Quantize images, surround them with zeros, move them to blocks, and dequantize them."""
    quantized = QUANTIZE(x, scale, zero_point, name)
    if codes is not None:
        quantized = quantized.clamp(*codes)
    moved = TO_DEPTH(quantized, zero_point, before, after, block)
    dequantized: Tensor = DEQUANTIZE(moved, scale, zero_point, 1, 0, "")
    return dequantized


@dataclass(frozen=True)
class _Margins:
    """How images [H, W] grow before they are moved to blocks, and by how many blocks after it.

    Less than 0 where some pixels are not read. `shift` zeros come before the weights.
    """

    shift: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    blocks_before: tuple[int, ...] = (0, 0)
    blocks_after: tuple[int, ...] = (0, 0)


def _margins(
    lengths: tuple[int, ...], kernel: tuple[int, ...], padding: Sequence[int], block: int
) -> _Margins:
    """Let the convolution pad where whole blocks are missing, which costs nothing."""
    sides = list(zip(lengths, kernel, padding, strict=True))
    counts = [-(-size // block) for size in kernel]  # blocks of a kernel
    steps = [(length + 2 * margin - size) // block for length, size, margin in sides]
    reach = [step + count for step, count in zip(steps, counts, strict=True)]  # blocks read
    shift = tuple(-margin % block for margin in padding)
    first = tuple((margin + s) // block for margin, s in zip(padding, shift, strict=True))
    ends = zip(reach, first, lengths, strict=True)
    last = tuple(all_ - before - length // block for all_, before, length in ends)
    fits = all(size + s <= block * n for size, s, n in zip(kernel, shift, counts, strict=True))
    if fits and min(last) >= 0 and not any(length % block for length in lengths):
        return _Margins(shift, (0, 0), (0, 0), first, last)
    after = (block * n - length - p for n, (length, _, p) in zip(reach, sides, strict=True))
    return _Margins((0, 0), tuple(padding), tuple(after))


def _in_blocks(codes: Tensor, shift: tuple[int, ...], block: int) -> Tensor:
    """Return weights [O, C, H, W] for images in blocks, [O, block² · C, ⌈H/block⌉, ⌈W/block⌉]."""
    out, channels = codes.shape[:2]
    codes = F.pad(codes, (shift[1], 0, shift[0], 0))
    codes = F.pad(codes, (0, -codes.shape[3] % block, 0, -codes.shape[2] % block))
    parts = codes.unflatten(3, (-1, block)).unflatten(2, (-1, block))  # O, C, H', b, W', b
    turned: Tensor = parts.permute(0, 3, 5, 1, 2, 4)
    return turned.reshape(out, block**2 * channels, *turned.shape[-2:]).contiguous()


def _arguments(node: fx.Node) -> list[Any]:
    return [*node.args, *_DEFAULTS[len(node.args) - 2 :]]


def _is_only(node: Any, function: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is function and len(node.users) == 1


def _constant(module: fx.GraphModule, node: Any) -> Tensor:
    found: Tensor = operator.attrgetter(str(node.target))(module)
    return found
