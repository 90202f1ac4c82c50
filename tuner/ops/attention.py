"""Scaled dot-product attention, and the decomposition of nn.MultiheadAttention."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.ops.attention_blocks import attend, can_attend
from tuner.ops.base import (
    CallFacts,
    Family,
    Operand,
    Product,
    Splits,
    is_float_tensor,
    tensor_slot,
)

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
QUERY, KEY, PROBABILITIES, VALUE = range(4)


class AttentionFamily(Family):
    """softmax(q kᵀ · scale + mask) v. Operands: query, key, probabilities, value, in this order."""

    op_type = "scaled_dot_product_attention"

    def accepts(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether q, k and v are dense float tensors."""
        tensors = [tensor_slot(args, kwargs, i, _NAMES[i]) for i in range(3)]
        return all(is_float_tensor(t) and not t.is_nested for t in tensors)

    def invoke(
        self,
        operand: Operand,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Compute attention in its parts (equal to the fused op up to float rounding)."""
        bound = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        query, key, value = (bound[name] for name in _NAMES[:3])
        if bound.get("enable_gqa"):
            repeat = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(repeat, -3)
            value = value.repeat_interleave(repeat, -3)
        scores = operand(QUERY, query) @ operand(KEY, key).transpose(-2, -1)
        scores = scores.mul_(_scale(bound, query))
        scores = _masked(scores, bound.get("attn_mask"), bool(bound.get("is_causal")))
        probabilities = _softmax(scores, bound.get("attn_mask"))
        if bound.get("dropout_p"):
            probabilities = F.dropout(probabilities, bound["dropout_p"])
        return operand(PROBABILITIES, probabilities) @ operand(VALUE, value)

    def compute(
        self,
        operand: Operand,
        splits: Splits,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Compute attention block by block where it is plain, else as `invoke` does."""
        bound = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        tensors = [bound[name] for name in _NAMES[:3]]
        is_plain = bound.get("attn_mask") is None and not bound.get("dropout_p")
        if is_plain and splits(PROBABILITIES) and can_attend(*tensors):
            q, k, v = map(operand, (QUERY, KEY, VALUE), tensors)
            scale, is_causal = _scale(bound, q), bool(bound.get("is_causal"))
            out = attend(q, k, v, scale, is_causal, partial(operand, PROBABILITIES))
            if out is not None:
                return out
        return self.invoke(operand, fn, args, kwargs)

    def products(self, call: CallFacts) -> tuple[Product, ...]:
        """Count q kᵀ and p v."""
        scores = call.operands[PROBABILITIES].numel()
        return (
            Product(scores * call.operands[QUERY].shape[-1], QUERY, KEY),
            Product(scores * call.operands[VALUE].shape[-1], PROBABILITIES, VALUE),
        )


def _scale(bound: Mapping[str, Any], query: Tensor) -> float:
    scale: float | None = bound.get("scale")
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Mask scores, which nobody else holds: causal ones in place."""
    if is_causal:
        lengths = scores.shape[-2:]
        hidden = torch.ones(lengths, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill_(hidden, float("-inf"))
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax whose fully masked rows are 0, as the fused op has it; causal rows see themselves."""
    probabilities = torch.softmax(scores, -1)
    if mask is None:
        return probabilities
    hidden = ~mask if mask.dtype == torch.bool else torch.isneginf(mask)
    empty = hidden.all(-1, keepdim=True)
    # a trace cannot branch on values: there it is always filled in
    if torch.compiler.is_compiling() or bool(empty.any()):
        return probabilities.masked_fill(empty, 0.0)
    return probabilities


class SiteCall(Protocol):
    """Calls a function as the named part of a decomposed module."""

    def __call__(self, part: str, fn: Callable[..., Any], *args: Any) -> Any: ...


def multihead_attention(
    module: nn.MultiheadAttention,
    site: SiteCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute nn.MultiheadAttention in its parts, each called through `site`.

    Takes and returns what `nn.MultiheadAttention.forward` does. Parts: q_proj, k_proj, v_proj,
    matmul:0 (q kᵀ), matmul:1 (p v), out_proj.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    q, k, v = _project(module, site, query, key, value)
    length, batch, width = q.shape
    heads = module.num_heads
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat((k, module.bias_k.repeat(1, batch, 1)))
        v = torch.cat((v, module.bias_v.repeat(1, batch, 1)))
    q, k, v = (_heads(t, heads) for t in (q, k, v))
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    scores = site("matmul:0", torch.matmul, q / math.sqrt(width // heads), k.transpose(-2, -1))
    if is_causal and key_padding_mask is None and not need_weights:
        scores = _masked(scores, None, is_causal=True)  # there torch takes the hint for the mask
    else:
        scores = scores + _merged_mask(scores, attn_mask, key_padding_mask, batch, heads)
    probabilities = F.dropout(torch.softmax(scores, -1), module.dropout, module.training)
    out = site("matmul:1", torch.matmul, probabilities, v)
    out = out.permute(2, 0, 1, 3).reshape(length, batch, width)
    out = site("out_proj", F.linear, out, module.out_proj.weight, module.out_proj.bias)
    weights: Tensor | None = None
    if need_weights:
        weights = probabilities.mean(1) if average_attn_weights else probabilities
        weights = weights if batched else weights.squeeze(0)
    if not batched:
        return out.squeeze(1), weights
    return (out.transpose(0, 1) if module.batch_first else out), weights


def _project(
    module: nn.MultiheadAttention, site: SiteCall, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    width = module.embed_dim
    biases: Any = (None, None, None)
    if module.in_proj_bias is not None:
        biases = tuple(module.in_proj_bias[i * width : (i + 1) * width] for i in range(3))
    if module.in_proj_weight is not None:
        weights = tuple(module.in_proj_weight[i * width : (i + 1) * width] for i in range(3))
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    return (
        site("q_proj", F.linear, query, weights[0], biases[0]),
        site("k_proj", F.linear, key, weights[1], biases[1]),
        site("v_proj", F.linear, value, weights[2], biases[2]),
    )


def _heads(x: Tensor, heads: int) -> Tensor:
    length, batch, width = x.shape
    return x.reshape(length, batch, heads, width // heads).permute(1, 2, 0, 3)


def _merged_mask(
    scores: Tensor, attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int
) -> Tensor:
    total = scores.new_zeros(())
    for mask, is_padding in ((attn_mask, False), (padding, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = scores.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
        missing = scores.shape[-1] - mask.shape[-1]
        mask = F.pad(mask, (0, missing)) if missing else mask
        if is_padding:
            mask = mask.view(batch, 1, 1, -1)
        elif mask.dim() == 3:
            mask = mask.view(batch, heads, *mask.shape[-2:])
        total = total + mask.to(scores.dtype)
    return total
