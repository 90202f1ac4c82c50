"""What can be quantized: op families, and the tables that find them.

A newcomer adds a family as one file and one row here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.ops.attention import AttentionFamily, SiteCall, multihead_attention
from tuner.ops.base import CallFacts, Family, Op, Operand, Product, WeightRef
from tuner.ops.conv import ConvFamily, ConvTransposeFamily
from tuner.ops.elementwise import (
    BinaryFamily,
    CatFamily,
    InPlaceAddFamily,
    InPlaceMulFamily,
    UnaryFamily,
)
from tuner.ops.embedding import EmbeddingFamily
from tuner.ops.linear import LinearFamily
from tuner.ops.matmul import AddmmFamily, EinsumFamily, MatmulFamily, ReversedMatmulFamily
from tuner.ops.recurrent import RecurrentFamily

__all__ = [
    "FAMILY_OF_MODULE",
    "FUNCTIONS",
    "CallFacts",
    "Family",
    "Op",
    "Operand",
    "Product",
    "SiteCall",
    "WeightRef",
    "multihead_attention",
]

_LINEAR = LinearFamily()
_CONV = {1: ConvFamily(1, nn.Conv1d), 2: ConvFamily(2, nn.Conv2d), 3: ConvFamily(3, nn.Conv3d)}
_CONV_TRANSPOSE = {
    1: ConvTransposeFamily(1, nn.ConvTranspose1d),
    2: ConvTransposeFamily(2, nn.ConvTranspose2d),
    3: ConvTransposeFamily(3, nn.ConvTranspose3d),
}
_MATMUL = MatmulFamily("matmul")
_RMATMUL = ReversedMatmulFamily("matmul")
_BMM = MatmulFamily("bmm")
_ADDMM, _BADDBMM = AddmmFamily("matmul"), AddmmFamily("bmm")
_ADD, _MUL = BinaryFamily("add"), BinaryFamily("mul")
_ADD_, _MUL_ = InPlaceAddFamily("add"), InPlaceMulFamily("mul")
_LAYER_NORM = UnaryFamily("LayerNorm", (nn.LayerNorm,))
_SOFTMAX = UnaryFamily("Softmax", (nn.Softmax,))

_MODULE_FAMILIES: tuple[Family, ...] = (
    _LINEAR,
    *_CONV.values(),
    *_CONV_TRANSPOSE.values(),
    EmbeddingFamily("Embedding", (nn.Embedding,), 1),
    EmbeddingFamily("EmbeddingBag", (nn.EmbeddingBag,), 1),
    RecurrentFamily("LSTM", nn.LSTM),
    RecurrentFamily("GRU", nn.GRU),
    _LAYER_NORM,
    _SOFTMAX,
)

FAMILY_OF_MODULE: dict[type[nn.Module], Family] = {
    module_type: family for family in _MODULE_FAMILIES for module_type in family.module_types
}

FUNCTIONS: dict[Callable[..., Any], tuple[str, Family]] = {
    F.linear: ("linear", _LINEAR),
    torch.conv1d: ("conv1d", _CONV[1]),
    torch.conv2d: ("conv2d", _CONV[2]),
    torch.conv3d: ("conv3d", _CONV[3]),
    torch.conv_transpose1d: ("conv_transpose1d", _CONV_TRANSPOSE[1]),
    torch.conv_transpose2d: ("conv_transpose2d", _CONV_TRANSPOSE[2]),
    torch.conv_transpose3d: ("conv_transpose3d", _CONV_TRANSPOSE[3]),
    torch.matmul: ("matmul", _MATMUL),
    Tensor.matmul: ("matmul", _MATMUL),
    Tensor.__matmul__: ("matmul", _MATMUL),
    Tensor.__rmatmul__: ("matmul", _RMATMUL),
    torch.mm: ("matmul", _MATMUL),
    Tensor.mm: ("matmul", _MATMUL),
    torch.bmm: ("bmm", _BMM),
    Tensor.bmm: ("bmm", _BMM),
    torch.addmm: ("addmm", _ADDMM),
    Tensor.addmm: ("addmm", _ADDMM),
    torch.baddbmm: ("baddbmm", _BADDBMM),
    Tensor.baddbmm: ("baddbmm", _BADDBMM),
    torch.einsum: ("einsum", EinsumFamily()),
    F.scaled_dot_product_attention: ("scaled_dot_product_attention", AttentionFamily()),
    F.embedding: ("embedding", EmbeddingFamily("Embedding", (), 1)),
    torch.embedding: ("embedding", EmbeddingFamily("Embedding", (), 0)),
    F.embedding_bag: ("embedding_bag", EmbeddingFamily("EmbeddingBag", (), 1)),
    torch.add: ("add", _ADD),
    Tensor.add: ("add", _ADD),
    Tensor.__add__: ("add", _ADD),
    Tensor.__radd__: ("add", _ADD),
    Tensor.add_: ("add", _ADD_),
    Tensor.__iadd__: ("add", _ADD_),
    torch.mul: ("mul", _MUL),
    Tensor.mul: ("mul", _MUL),
    Tensor.__mul__: ("mul", _MUL),
    Tensor.__rmul__: ("mul", _MUL),
    Tensor.mul_: ("mul", _MUL_),
    Tensor.__imul__: ("mul", _MUL_),
    torch.cat: ("cat", CatFamily()),
    torch.concat: ("cat", CatFamily()),
    torch.concatenate: ("cat", CatFamily()),
    F.layer_norm: ("layer_norm", _LAYER_NORM),
    torch.layer_norm: ("layer_norm", _LAYER_NORM),
    F.softmax: ("softmax", _SOFTMAX),
    torch.softmax: ("softmax", _SOFTMAX),
    Tensor.softmax: ("softmax", _SOFTMAX),
}
