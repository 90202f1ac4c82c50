"""Attention in blocks against torch's own functions, one after the other, to the bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tuner.ops import FUNCTIONS, Operand, attention_blocks
from tuner.ops.attention import KEY, PROBABILITIES, QUERY, VALUE
from tuner.qparams import QParams
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme

STEPS = {QUERY: 2.0**-5, KEY: 2.0**-5, PROBABILITIES: 2.0**-6, VALUE: 2.0**-4}
ATTENTION = FUNCTIONS[F.scaled_dot_product_attention][1]
INT8 = TensorScheme(format="int8")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "_BLOCK", 5 * 48 * 48 // torch.get_num_threads())


def operands(batch: int = 4, length: int = 48, heads: int = 3, width: int = 16) -> list[Tensor]:
    """Return q, k and v `[batch, heads, length, width]` as parts of one tensor."""
    generator = torch.Generator().manual_seed(length)
    together = torch.randn(batch, length, 3, heads, width, generator=generator)
    return list(together.clamp(-3, 3).permute(2, 0, 3, 1, 4))


def rounded(index: int, x: Tensor) -> Tensor:
    """Fake-quantize by torch: exact, since steps are powers of two."""
    return torch.fake_quantize_per_tensor_affine(x, STEPS[index], 0, -128, 127)


def same(index: int, x: Tensor) -> Tensor:
    return x


def in_parts(operand: Operand, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = operand(QUERY, q) @ operand(KEY, k).transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return operand(PROBABILITIES, scores.softmax(-1)) @ operand(VALUE, v)


class Quantizers:
    """Receives operands, and keeps the shapes of the probabilities that came."""

    def __init__(self, scheme: TensorScheme = INT8) -> None:
        self.blocks: list[torch.Size] = []
        self._quantizers = {i: Quantizer(INT8, QParams(step)) for i, step in STEPS.items()}
        if scheme.is_dynamic:
            self._quantizers[PROBABILITIES] = Quantizer(scheme)

    def __call__(self, index: int, x: Tensor) -> Tensor:
        if index == PROBABILITIES:
            self.blocks.append(x.shape)
        return self._quantizers[index](x)

    def splits(self, index: int) -> bool:
        return self._quantizers[index].is_elementwise

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        function = F.scaled_dot_product_attention
        result: Tensor = ATTENTION.compute(self, self.splits, function, args, kwargs)
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(4, 48, 3, 16), (1, 48, 1, 16), (16, 7, 5, 8), (2, 100, 2, 4)])
def test_blocks_equal_torch_to_the_bit(shape: tuple[int, int, int, int], causal: bool) -> None:
    quantizers = Quantizers()
    q, k, v = operands(*shape)
    with torch.no_grad():
        out = quantizers.attend(q, k, v, is_causal=causal)
        assert torch.equal(out, in_parts(rounded, q, k, v, causal))
    assert sum(block[0] * block[1] for block in quantizers.blocks) == math.prod(shape[:3])


@pytest.mark.parametrize("length", [64, 65, 128, 200, 512])
def test_what_a_causal_mask_hides_is_not_computed(length: int) -> None:
    quantizers = Quantizers()
    q, k, v = operands(1, length, 2, 8)
    with torch.no_grad():
        out = quantizers.attend(q, k, v, is_causal=True)
        assert torch.equal(out, in_parts(rounded, q, k, v, causal=True))
    computed = sum(block.numel() for block in quantizers.blocks)
    assert computed <= (length + 64) * (length + 64)  # of two heads: half of all, and the diagonal


def test_there_are_several_blocks_and_a_rest() -> None:
    quantizers = Quantizers()
    with torch.no_grad():
        quantizers.attend(*operands())
    assert [block[0] for block in quantizers.blocks] == [3, 3, 3, 3]  # of at most 5: whole samples


def test_one_sample_with_more_heads_than_a_block_has() -> None:
    quantizers = Quantizers()
    q, k, v = operands(batch=2, heads=7)
    with torch.no_grad():
        assert torch.equal(quantizers.attend(q, k, v), in_parts(rounded, q, k, v, False))
    assert [block[0] for block in quantizers.blocks] == [5, 2, 5, 2]


@pytest.mark.parametrize("causal", [False, True])
def test_the_output_lies_in_memory_as_that_of_torch_does(causal: bool) -> None:
    """Code that takes a view of the output for granted runs on."""
    q, k, v = operands()
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out = Quantizers().attend(q, k, v, is_causal=causal)
    assert out.stride() == expected.stride()
    assert out.transpose(1, 2).view(4, 48, 48).shape == (4, 48, 48)


@pytest.mark.parametrize("lead", [(), (2, 3, 5)])
def test_more_or_fewer_axes_than_samples_and_heads(lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*lead, 20, 8, generator=generator).clamp(-3, 3) for _ in range(3))
    with torch.no_grad():
        assert torch.equal(Quantizers().attend(q, k, v), in_parts(rounded, q, k, v, False))


def test_more_queries_than_keys_under_a_causal_mask() -> None:
    q, (k, _, v) = operands(length=150)[0], operands(length=31)
    visible = torch.ones(150, 31, dtype=torch.bool).tril()
    with torch.no_grad():
        out = Quantizers().attend(q, k, v, is_causal=True)
        scores = rounded(QUERY, q) @ rounded(KEY, k).mT * 16**-0.5
        shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        assert torch.equal(out, rounded(PROBABILITIES, shares) @ rounded(VALUE, v))


def test_keys_and_values_of_another_length_and_width() -> None:
    q, (k, _, v) = operands()[0], operands(length=31)
    v = v[..., :5]
    with torch.no_grad():
        out = Quantizers().attend(q, k, v, is_causal=True, scale=0.25)
        scores = rounded(QUERY, q) @ rounded(KEY, k).mT * 0.25
        scores = scores.masked_fill(~torch.ones(48, 31, dtype=torch.bool).tril(), -torch.inf)
        assert torch.equal(out, rounded(PROBABILITIES, scores.softmax(-1)) @ rounded(VALUE, v))


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
def test_infinite_scores_that_are_masked_do_no_harm(value: float) -> None:
    q, k, v = (x.clone() for x in operands())
    k[1, :, -1] = value
    q[1, :, 3] = 1e30
    with torch.no_grad():
        function = F.scaled_dot_product_attention
        out = ATTENTION.compute(same, lambda i: True, function, (q, k, v), {"is_causal": True})
        expected = in_parts(same, q, k, v, causal=True)
    assert bool(expected[:, :, :-1].isfinite().all())
    assert torch.equal(out[:, :, :-1], expected[:, :, :-1])
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.zeros(48, 48)},
        {"attn_mask": torch.ones(4, 1, 48, 48, dtype=torch.bool)},
        {"dropout_p": 1e-9},
    ],
)
def test_masks_and_dropout_are_computed_as_a_whole(options: dict[str, Any]) -> None:
    quantizers = Quantizers()
    q, k, v = operands()
    with torch.no_grad():
        assert torch.equal(quantizers.attend(q, k, v, **options), in_parts(rounded, q, k, v, False))
    assert quantizers.blocks == [torch.Size([4, 3, 48, 48])]


def test_heads_that_share_keys() -> None:
    q, k, v = operands()
    shared, expanded = (k[:, :1], v[:, :1]), (k[:, :1].expand(k.shape), v[:, :1].expand(v.shape))
    with torch.no_grad():
        out = Quantizers().attend(q, *shared, enable_gqa=True)
        assert torch.equal(out, in_parts(rounded, q, *expanded, False))


def test_scales_of_the_whole_are_taken_of_the_whole() -> None:
    quantizers = Quantizers(TensorScheme(format="int8", dynamic=True))
    with torch.no_grad():
        quantizers.attend(*operands())
    assert quantizers.blocks == [torch.Size([4, 3, 48, 48])]


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_torchs(causal: bool) -> None:
    def gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in operands()]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    ours = gradients(lambda q, k, v: Quantizers().attend(q, k, v, is_causal=causal))
    theirs = gradients(lambda q, k, v: in_parts(rounded, q, k, v, causal))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_half_precision_and_autocast_stay_what_they_were() -> None:
    q, k, v = operands()
    with torch.no_grad():
        halves = [x.bfloat16() for x in (q, k, v)]
        assert torch.equal(Quantizers().attend(*halves), in_parts(rounded_half, *halves, False))
        with torch.autocast("cpu", torch.bfloat16):
            out = Quantizers().attend(q, k, v)
            assert out.dtype == torch.bfloat16
            assert torch.equal(out, in_parts(rounded_half, q, k, v, False))


def rounded_half(index: int, x: Tensor) -> Tensor:
    return rounded(index, x.float()).to(x.dtype)
