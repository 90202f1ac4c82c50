"""The native kernels against the torch path, bit for bit; and the buffers that they lend."""

import copy
import io
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.contracts.references import ML_FORMATS, PATHS, assert_same_bits, take_path
from tuner import formats
from tuner.allocator import Malloc
from tuner.errors import DataError, SchemeError
from tuner.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from tuner.kernels import buffers
from tuner.kernels.buffers import BufferPool
from tuner.qparams import QParams, compute_qparams, dequantize, fake_quantize, quantize
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme

GRANULARITIES: list[Granularity] = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerGroup(2),
    PerGroup(3),
    PerGroup(4, 0),
    PerGroup(2, -2),
    PerGroup(100, 1),
    PerToken(),
    PerBlock(4),
]
FORMATS = [
    *("e4m3fn", "e2m1", "e4m0", "e8m5", "e4m3fn_nosub", "e5m2_overflow"),
    *("e3m2fnuz_nosub_overflow", "bf16", "int8"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "one wide": lambda x: x[:, :1],
    "negative": lambda x: torch._neg_view(-x),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
}


def odd_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
        -12, 12, shape, generator=generator
    )
    flat = x.reshape(-1)
    flat[: 6 * 37 : 37] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40])
    return x.to(dtype)


def both_paths(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    results = []
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            take_path(path, patch)
            results.append(compute())
    return results[0], results[1]


def as_bits(x: torch.Tensor) -> np.ndarray:
    x = x.detach().contiguous()
    return x.view(torch.int16).numpy().view(np.float16) if x.itemsize == 2 else x.numpy()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    nan = ours.isnan()
    assert torch.equal(nan, theirs.isnan())
    integers = torch.int16 if ours.itemsize == 2 else torch.int32
    bits = [t.detach().contiguous().view(integers).masked_fill(nan, 0) for t in (ours, theirs)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("name", FORMATS)
class TestBothPaths:
    def test_layouts(self, name: str, granularity: Granularity) -> None:
        scheme = TensorScheme(format=name, granularity=granularity)
        x = odd_values((4, 6, 5, 7), torch.float32)
        for view in VIEWS.values():
            viewed = view(x)
            qparams = compute_qparams(viewed, scheme)
            native, torch_only = both_paths(lambda v=viewed, q=qparams: fake_quantize(v, scheme, q))
            assert_same(native, torch_only)
            assert native.stride() == torch.empty_like(viewed).stride()
            expected = fake_quantize(viewed.detach().resolve_neg().contiguous(), scheme, qparams)
            assert_same(native, expected)
            assert_same(fake_quantize(viewed, scheme), native)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, name: str, granularity: Granularity, dtype: torch.dtype) -> None:
        scheme = TensorScheme(format=name, granularity=granularity)
        x = odd_values((4, 6, 35), dtype)
        native, torch_only = both_paths(lambda: fake_quantize(x, scheme))
        assert_same(native, torch_only)
        assert native.dtype == dtype
        wide = fake_quantize(x.float(), scheme)  # computed in fp32, then rounded once
        largest = torch.finfo(dtype).max
        finite = wide.clamp(-largest, largest)
        expected = torch.where(wide.isinf(), wide, finite) if "overflow" in name else finite
        assert_same(native, expected.to(dtype))

    def test_gradient(self, name: str, granularity: Granularity) -> None:
        scheme = TensorScheme(format=name, granularity=granularity)
        x = odd_values((4, 6, 35), torch.float32).nan_to_num(0.0, 9.0, -9.0)
        upstream = torch.randn(4, 6, 35)
        qparams = compute_qparams(x / 3, scheme)

        def gradient() -> torch.Tensor:
            leaf = x.clone().requires_grad_()
            fake_quantize(leaf, scheme, qparams).backward(upstream)
            assert leaf.grad is not None
            return leaf.grad

        native, torch_only = both_paths(gradient)
        assert_same(native, torch_only)
        assert bool((native == 0).any()) or name in ("fp16", "bf16")
        assert bool((native == upstream).any())

    @pytest.mark.parametrize("shape", [(0,), (3, 0, 4), (0, 3, 4)])
    def test_empty(self, name: str, granularity: Granularity, shape: tuple[int, ...]) -> None:
        scheme = TensorScheme(format=name, granularity=granularity)
        x = torch.zeros(shape)
        for path in PATHS:
            with pytest.MonkeyPatch.context() as patch:
                take_path(path, patch)
                try:
                    y = fake_quantize(x, scheme)
                except SchemeError:
                    assert len(shape) == 1  # no such axis
                else:
                    assert y.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 1, 2)])
def test_small_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scheme = TensorScheme(format="e4m3fn")
    x = torch.full(shape, 3.3, dtype=dtype)
    native, torch_only = both_paths(lambda: fake_quantize(x, scheme))
    assert_same(native, torch_only)
    assert native.shape == shape


@pytest.mark.parametrize(
    ("name", "threads"), [("e4m3fn", 1), ("e4m3fn", 2), ("e8m5", 2), ("int8", 2), ("mxfp4", 2)]
)
def test_large_tensors_in_pieces(name: str, threads: int) -> None:
    """Long runs are cut, in C among threads and in torch into chunks."""
    x = torch.randn(2, 70, 1031)
    cut = [PerTensor(), PerChannel(1), PerToken(), PerGroup(32, 1), PerGroup(100)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for granularity in cut:
            scheme = TensorScheme(format=name, granularity=granularity)
            native, torch_only = both_paths(lambda s=scheme: fake_quantize(x, s))
            assert_same(native, torch_only)
    finally:
        torch.set_num_threads(before)


GAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads": lambda x: x[:, :, 0].transpose(1, 2),
    "part": lambda x: x[:, :, 1],
    "short rows": lambda x: x[..., :7],  # five axes
    "matrix": lambda x: x[0, 0, 0, :, :3],
    "repeated": lambda x: x[:, :1, 0].expand(-1, 5, -1, -1)[..., :9],
    "long rows": lambda x: x.reshape(2, -1)[:, :5000],
    "nothing": lambda x: x[:, :0, 1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", GAPS)
@pytest.mark.parametrize("name", ["int8", "e4m3fn", "nf4"])
def test_rows_with_gaps(name: str, view: str, dtype: torch.dtype) -> None:
    whole = odd_values((32, 16, 3, 4, 20), dtype)
    x = GAPS[view](whole)
    quantizer = Quantizer(TensorScheme(format=name), QParams(0.05))
    native, torch_only = both_paths(lambda: quantizer(x))
    assert native.is_contiguous()
    assert_same(native, torch_only)
    assert_same(native, fake_quantize(x.clone(), quantizer.scheme, QParams(0.05)))


BLOCK_FORMATS = ["nvfp4", "nvfp4_subnormal", "nf4", "abfp4", "abfp8_n128", "mxfp6_e3m2", "mxint8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16,), (5, 37), (2, 3, 256), (7, 0), (1, 3, 1)])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_block_formats(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scheme = TensorScheme(format=name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    if x.numel() > 40:
        x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    for view in (x, x.mT.contiguous().mT if x.ndim > 1 else x):
        native, torch_only = both_paths(lambda v=view: fake_quantize(v, scheme))
        assert_same(native, torch_only)

    def gradient() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, scheme).backward(torch.ones_like(x))
        assert leaf.grad is not None
        return leaf.grad

    native, torch_only = both_paths(gradient)
    assert_same(native, torch_only)


@pytest.mark.parametrize(
    "shape",
    [(3, 1093), (33, 544), (2, 40_000), (9000, 1), (3000, 7), (2100, 8), (40, 31), (4, 0)],
)
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "mxint8"])
def test_many_mx_blocks_of_all_magnitudes(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-60, 60, (shape[0], -(-shape[1] // 32)), generator=generator)
    scales = torch.exp2(exponents.float()).repeat_interleave(32, -1)[:, : shape[1]]
    x = torch.randn(shape, generator=generator) * scales
    x[1, -1:] = torch.nan
    native, torch_only = both_paths(lambda: fake_quantize(x, TensorScheme(format=name)))
    assert_same(native, torch_only)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("count", [2, 7, 16, 256, 300])
def test_codebooks(count: int, granularity: Granularity) -> None:
    generator = torch.Generator().manual_seed(count)
    entries = sorted({float(v) for v in torch.randn(count, generator=generator)})
    name = f"codebook_of_{count}_entries"
    if name not in formats.names():
        formats.register(name, codebook=entries)
    scheme = TensorScheme(format=name, granularity=granularity)
    x = torch.randn(5, 6, 9, generator=generator) * 2
    middle = torch.tensor(entries, dtype=torch.float64)
    ties = ((middle[1:] + middle[:-1]) / 2).float()[:40]
    x.view(-1)[: len(ties)] = ties
    x.view(-1)[-3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    qparams = compute_qparams(x, scheme)
    native, torch_only = both_paths(lambda: fake_quantize(x, scheme, qparams))
    assert_same(native, torch_only)
    unscaled, _ = both_paths(lambda: fake_quantize(x, TensorScheme(format=name), QParams(1.0)))
    finite = x.isfinite()
    distances = (x[finite].double().unsqueeze(-1) - middle).abs()
    assert torch.equal(unscaled[finite], middle[distances.argmin(-1)].float())  # the lower of two


def amax_of(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Return the largest magnitude that every value shares its scale with, in the shape of `x`."""
    x = x.abs()
    if isinstance(granularity, PerTensor):
        return x.max().expand(x.shape)
    if isinstance(granularity, PerChannel):
        axes = [axis for axis in range(x.ndim) if axis != granularity.axis % x.ndim]
        return x.amax(axes, keepdim=True).expand(x.shape)
    axis = granularity.axis if isinstance(granularity, PerGroup) else -1
    size = x.shape[-1] if isinstance(granularity, PerToken) else granularity.size  # type: ignore[union-attr]
    pieces = [p.amax(axis, keepdim=True).expand(p.shape) for p in x.split(size, axis)]
    return torch.cat(pieces, axis)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m4", "e2m1", "e4m3fnuz"])
def test_scale_by_definition(name: str, granularity: Granularity, power_of_two: bool) -> None:
    scheme = TensorScheme(format=name, granularity=granularity, power_of_two_scale=power_of_two)
    x = torch.randn(5, 6, 9) * torch.logspace(-8, 8, 30).reshape(5, 6, 1)
    reference = ML_FORMATS[name]
    scale = (amax_of(x, granularity).double() / reference.largest).numpy()
    scale = np.exp2(np.ceil(np.log2(scale))) if power_of_two else scale
    scale = scale.astype(np.float32)
    expected = reference.round(x.numpy() / scale) * scale
    ours, _ = both_paths(lambda: fake_quantize(x, scheme))
    assert_same_bits(ours, expected, x.numpy())


@pytest.mark.parametrize("name", ["e4m3fn", "e2m1", "e3m4", "bf16"])
def test_double_precision(name: str) -> None:
    """A value just above a tie, by less than fp32 sees, goes up."""
    values = np.unique(np.abs(ML_FORMATS[name].values().astype(np.float32)))[:120].astype(float)
    values = values[np.isfinite(values)]
    ties = (values[1:] + values[:-1]) / 2
    scale = 1.0 + 2.0**-20  # no power of two, but exact in fp32
    above, below = (np.nextafter(ties * scale, toward) for toward in (np.inf, 0.0))
    scheme, qparams = TensorScheme(format=name), QParams(scale)
    up, down = (fake_quantize(torch.from_numpy(x), scheme, qparams) for x in (above, below))
    far = np.abs(above / scale - ties) > 0  # where the quotient does not fall back on the tie
    assert far.mean() > 0.2
    assert torch.equal(up[far], torch.from_numpy(values[1:] * scale)[far])
    far = np.abs(below / scale - ties) > 0
    assert torch.equal(down[far], torch.from_numpy(values[:-1] * scale)[far])


@pytest.mark.parametrize("path", PATHS)
def test_saturation_and_specials(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_path(path, monkeypatch)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1000.0])
    scheme = TensorScheme(format="e4m3fn")
    y = fake_quantize(x, scheme, QParams(0.5))
    assert y.tolist()[:2] == [224.0, -224.0]
    assert bool(y[2].isnan())
    assert bool(torch.signbit(y[3]))
    assert y[4] == 224.0
    overflow = fake_quantize(x, TensorScheme(format="e4m3fn_overflow"), QParams(0.5))
    assert overflow.isnan().tolist() == [True, True, True, False, True]
    overflow = fake_quantize(x, TensorScheme(format="e4m3_overflow"), QParams(0.5))
    assert overflow.tolist()[:2] == [torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_overflow_in_half_precision(
    path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    x = torch.tensor([1000.0, -1000.0, 3.0], dtype=dtype)
    y = fake_quantize(x, TensorScheme(format="e4m3_overflow"), QParams(1.0))
    assert y.tolist() == [torch.inf, -torch.inf, 3.0]


class TestGradients:
    @pytest.fixture(params=PATHS, autouse=True)
    def _path(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        take_path(request.param, monkeypatch)

    def gradient(
        self, scheme: TensorScheme, x: torch.Tensor, upstream: torch.Tensor
    ) -> list[float]:
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, scheme, QParams(0.5)).backward(upstream)
        assert leaf.grad is not None
        return [float(value) for value in leaf.grad]

    def test_the_largest_is_inside(self) -> None:
        x = torch.tensor([3.0, 3.01, -3.0, -3.01, torch.inf, torch.nan, 0.0])
        gradient = self.gradient(TensorScheme(format="e2m1"), x, torch.ones(7))
        assert gradient == [1, 0, 1, 0, 0, 0, 1]

    @pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "int8", "nf4"])
    def test_the_largest_value_of_a_tensor_is_inside(self, name: str) -> None:
        for seed in range(50):
            torch.manual_seed(seed)
            x = torch.randn(50, requires_grad=True)
            fake_quantize(x, TensorScheme(format=name)).sum().backward()
            assert torch.equal(torch.as_tensor(x.grad), torch.ones(50))

    @pytest.mark.parametrize("backward", ["e5m2", "e5m2_unscaled", "int4", "mxfp8_e5m2", "bf16"])
    def test_a_format_of_its_own(self, backward: str) -> None:
        scheme = TensorScheme(format="e3m4", backward_format=backward)
        x, upstream = torch.randn(64), torch.randn(64) * 3e-3
        expected = fake_quantize(upstream, TensorScheme(format=backward))
        assert not torch.equal(expected, upstream)
        assert torch.equal(torch.tensor(self.gradient(scheme, x, upstream)), expected)
        leaf = x.clone().requires_grad_()
        y = fake_quantize(leaf, scheme)
        assert torch.equal(y, fake_quantize(x, TensorScheme(format="e3m4")))
        quantizer = Quantizer(scheme, QParams(0.5))
        quantizer(leaf).backward(upstream)
        assert torch.equal(torch.as_tensor(leaf.grad), expected)

    def test_of_a_gradient(self) -> None:
        x = torch.tensor([0.3, 1.0, 100.0], requires_grad=True)
        y = fake_quantize(x, TensorScheme(format="e2m1"), QParams(1.0))
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert second.tolist() == [2, 2, 0]

    def test_a_negated_gradient(self) -> None:
        x = torch.ones(4, requires_grad=True)
        y = fake_quantize(x, TensorScheme(format="e2m1"), QParams(1.0))
        y.backward(torch._neg_view(torch.ones(4)))
        assert torch.as_tensor(x.grad).tolist() == [-1] * 4

    def test_an_expanded_gradient(self) -> None:
        x = torch.ones(4, 3, requires_grad=True)
        fake_quantize(x, TensorScheme(format="e2m1"), QParams(1.0)).sum().backward()
        assert torch.equal(torch.as_tensor(x.grad), torch.ones(4, 3))

    @pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
    def test_of_a_transposed_tensor(self, granularity: Granularity) -> None:
        x = torch.randn(4, 5).t().requires_grad_()
        scheme = TensorScheme(format="e4m3fn", granularity=granularity)
        fake_quantize(x, scheme).backward(torch.arange(20.0).reshape(5, 4))
        assert torch.equal(torch.as_tensor(x.grad), torch.arange(20.0).reshape(5, 4))

    def test_many_at_once(self) -> None:
        x = torch.tensor([0.3, 1.0, 100.0], requires_grad=True)
        y = fake_quantize(x, TensorScheme(format="e2m1"), QParams(1.0))
        (found,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
        assert torch.equal(found, torch.diag(torch.tensor([1.0, 1.0, 0.0])))


class TestOddTensors:
    def test_integers_are_refused(self) -> None:
        with pytest.raises(DataError, match=r"got torch.int64: use x.float\(\)"):
            fake_quantize(torch.arange(3), TensorScheme(format="e4m3fn"))

    def test_a_subclass_goes_through_torch(self) -> None:
        class Mine(torch.Tensor):
            pass

        x = torch.randn(5)
        y = fake_quantize(x.as_subclass(Mine), TensorScheme(format="e4m3fn"), QParams(1.0))
        assert torch.equal(
            torch.Tensor(y), fake_quantize(x, TensorScheme(format="e4m3fn"), QParams(1.0))
        )

    def test_on_meta(self) -> None:
        y = fake_quantize(
            torch.empty(3, 4, device="meta"), TensorScheme(format="bf16"), QParams(1.0)
        )
        assert y.device.type == "meta"

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, for clamp_
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("name", ["int8", "uint8", "e4m3fn", "bf16", "mxfp4", "nf4", "nvfp4"])
    def test_vmap(self, name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        take_path(path, monkeypatch)
        x = torch.randn(3, 150_000)  # more than a chunk
        scheme = TensorScheme(format=name, symmetric=name != "uint8")
        y = torch.vmap(lambda row: fake_quantize(row, scheme))(x)
        assert torch.equal(y, torch.stack([fake_quantize(row, scheme) for row in x]))

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_gradients_of_each_sample(self) -> None:
        scheme, qparams = TensorScheme(format="int4"), QParams(0.2)
        x = torch.randn(3, 40)

        def loss(row: torch.Tensor) -> torch.Tensor:
            return fake_quantize(row, scheme, qparams).square().sum()

        each = torch.stack([torch.func.grad(loss)(row) for row in x])
        assert torch.equal(torch.vmap(torch.func.grad(loss))(x), each)
        assert bool((each == 0).any())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_large_gradients_go_past_the_cache_as_they_are(
        self, dtype: torch.dtype, threads: int
    ) -> None:
        count = (9 << 20) // dtype.itemsize + 5  # more than whole lines, and some bytes left over
        x = torch.randn(count).to(dtype).requires_grad_()
        gradient = torch.randn(count).to(dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            fake_quantize(x, TensorScheme(format="int8"), QParams(1 / 64)).backward(gradient)
        finally:
            torch.set_num_threads(before)
        assert x.grad is not None
        inside = (x >= -2) & (x <= 127 / 64)
        assert 0.9 < inside.float().mean() < 0.99
        assert torch.equal(x.grad, torch.where(inside, gradient, 0.0))

    @pytest.mark.parametrize("shape", [(3,), (2, 2), (6, 1)])
    def test_a_scale_of_another_shape_is_refused(self, shape: tuple[int, ...]) -> None:
        scheme = TensorScheme(format="e4m3fn", granularity=PerChannel(0))
        for path in PATHS:
            with pytest.MonkeyPatch.context() as patch:
                take_path(path, patch)
                with pytest.raises(SchemeError):
                    fake_quantize(torch.randn(6, 4), scheme, QParams(torch.ones(shape)))

    def test_a_scale_changed_in_place_counts(self) -> None:
        scheme = TensorScheme(format="e2m1", granularity=PerChannel(0))
        qparams = QParams(torch.ones(3))
        x = torch.full((3, 4), 100.0)
        assert fake_quantize(x, scheme, qparams).unique().tolist() == [6]
        assert isinstance(qparams.scale, torch.Tensor)
        qparams.scale.mul_(2)
        assert fake_quantize(x, scheme, qparams).unique().tolist() == [12]
        qparams.scale.data.mul_(2)
        assert fake_quantize(x, scheme, qparams).unique().tolist() == [24]
        qparams.scale.numpy()[:] = 8
        assert fake_quantize(x, scheme, qparams).unique().tolist() == [48]


LARGE = (1 << 20) + 3  # fp32 values: above what the pool leaves to malloc


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


HOLDERS: dict[str, Callable[[torch.Tensor], object]] = {
    "itself": lambda y: y,
    "view": lambda y: y[5:7],
    "detached": lambda y: y.detach(),
    "numpy": lambda y: y.numpy(),
    "numpy view": lambda y: y.numpy()[::2],
    "memoryview": lambda y: memoryview(y.numpy()),
    "dlpack": lambda y: np.from_dlpack(y),
    "storage": lambda y: y.untyped_storage(),
    "data": lambda y: y.data,
    "parameter": lambda y: torch.nn.Parameter(y),
    "autograd": lambda y: torch.ones(LARGE, requires_grad=True) * y,
    "closure": lambda y: lambda: y.sum(),
    "other dtype": lambda y: y.view(torch.int32),
    "typed storage": lambda y: torch.storage.TypedStorage(
        wrap_storage=y.untyped_storage(), dtype=y.dtype, _internal=True
    ),
}


class TestBufferPool:
    def test_a_free_buffer_is_lent_again(self) -> None:
        pool = BufferPool()
        x = torch.zeros(LARGE)
        y = pool.empty_like(x)
        first = address(y)
        del y
        assert address(pool.empty_like(x)) == first

    @pytest.mark.parametrize("holder", HOLDERS)
    def test_what_somebody_holds_is_not_lent(self, holder: str) -> None:
        pool = BufferPool()
        x = torch.zeros(LARGE)
        for _ in range(2):  # fresh, then lent again
            y = pool.empty_like(x)
            first = address(y)
            held = HOLDERS[holder](y)
            del y
            others = [pool.empty_like(x) for _ in range(3)]
            assert first not in [address(other) for other in others]
            del held, others
            assert first in [address(each) for each in [pool.empty_like(x) for _ in range(9)]]

    def test_copies_have_memory_of_their_own(self) -> None:
        pool = BufferPool()
        y = pool.empty_like(torch.zeros(LARGE)).fill_(3.0)
        again = io.BytesIO()
        torch.save(y, again)
        twin = copy.deepcopy(y)
        del y
        pool.empty_like(torch.zeros(LARGE)).fill_(7.0)
        again.seek(0)
        assert bool((twin == 3).all())
        assert bool((torch.load(again) == 3).all())

    def test_shared_memory_is_never_lent(self) -> None:
        pool = BufferPool()
        y = pool.empty_like(torch.zeros(LARGE)).fill_(3.0)
        y.share_memory_()
        first = address(y)
        del y
        assert address(pool.empty_like(torch.zeros(LARGE))) != first

    def test_a_resized_storage_is_not_lent(self) -> None:
        pool = BufferPool()
        x = torch.zeros(LARGE)
        y = pool.empty_like(x)
        y.untyped_storage().resize_(16)
        del y
        z = pool.empty_like(x)
        assert z.untyped_storage().nbytes() == x.nbytes
        z.fill_(1.0)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_shape_dtype_and_layout(self, layout: torch.memory_format) -> None:
        pool = BufferPool()
        shape = (4, 16, 128, 130)
        x = torch.zeros(shape).to(memory_format=layout)
        for _ in range(3):
            y = pool.empty_like(x)
            assert (y.shape, y.stride(), y.dtype) == (x.shape, x.stride(), x.dtype)
            assert not y.requires_grad
            halves = pool.empty_like(x.to(torch.bfloat16))
            assert halves.dtype == torch.bfloat16
            del y, halves

    def test_a_default_device_does_not_matter(self) -> None:
        pool = BufferPool()
        x = torch.zeros(LARGE)
        with torch.device("meta"):
            for _ in range(3):
                assert pool.empty_like(x).device.type == "cpu"

    def test_no_more_bytes_than_allowed(self) -> None:
        size = LARGE * 4
        pool = BufferPool(most_bytes=3 * size)
        held = [pool.empty_like(torch.zeros(LARGE)) for _ in range(8)]
        assert len({address(y) for y in held}) == 8
        kept = [buffer for of_a_size in pool._storages.values() for buffer in of_a_size]
        assert sum(buffer.storage.nbytes() for buffer in kept) <= 3 * size

    def test_no_more_of_a_size_than_is_quick_to_look_through(self) -> None:
        pool = BufferPool()
        x = torch.zeros(1 << 16)
        held = [pool.empty_like(x) for _ in range(100)]
        assert len({address(y) for y in held}) == 100
        assert len(pool._storages[x.nbytes]) == buffers._MOST_OF_A_SIZE

    def test_small_tensors_are_left_to_malloc(self) -> None:
        pool = BufferPool()
        pool.empty_like(torch.zeros(1000))
        assert not pool._storages

    def test_what_malloc_keeps_is_left_to_malloc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Malloc, "kept_bytes", 8 << 20)
        pool = BufferPool()
        x = torch.zeros(LARGE)
        lent = pool.empty_as(x), pool.empty_like(x), pool.empty_rows(x.shape, x.dtype)
        assert not pool._storages
        assert [y.shape for y in lent] == [x.shape] * 3
        pool.empty_like(torch.zeros(4 * LARGE))
        assert pool._storages

    def test_threads_never_share_a_buffer(self) -> None:
        """Every thread writes its own number, and finds it unchanged as long as it holds it."""
        pool = BufferPool()
        x = torch.zeros(LARGE)
        spoiled: list[int] = []
        start = threading.Barrier(4)

        def work(mark: int) -> None:
            start.wait()
            held: list[tuple[torch.Tensor, float]] = []
            for round_ in range(25):
                y = pool.empty_like(x)
                value = float(mark * 100 + round_)
                y.fill_(value)
                view = y[3:].view(-1) if round_ % 2 else y
                del y
                held.append((view, value))
                if not all(bool((view == value).all()) for view, value in held):
                    spoiled.append(mark)
                del held[: -(round_ % 3) or None]

        threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not spoiled

    def test_results_of_fake_quantize_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(buffers, "_SMALLEST_BYTES", 64)
        quantizer = Quantizer(TensorScheme(format="e4m3fn"), QParams(1.0))
        model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(6)))
        results = []
        for quantized in (torch.nn.Identity(), quantizer):
            torch.manual_seed(0)
            x = torch.randn(16, 32).mul(4).round().div(4)  # numbers that e4m3fn holds
            total = torch.zeros(())
            for layer in model:
                weight = fake_quantize(layer.weight, TensorScheme(format="e4m3fn"))
                x = torch.nn.functional.linear(quantized(x), weight).relu()
                total = total + x.square().mean()
            gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
            results.append([float(g.norm()) for g in gradients if g is not None])
        assert results[0] == pytest.approx(results[1], rel=0.2)


def test_codes_and_values_agree() -> None:
    x = odd_values((6, 40), torch.float32).nan_to_num(0.0, 9.0, -9.0)
    for name in FORMATS:
        if not formats.get(name).scaled:
            continue
        for granularity in GRANULARITIES:
            scheme = TensorScheme(format=name, granularity=granularity)
            qparams = compute_qparams(x, scheme)
            codes = quantize(x, scheme, qparams)
            y = fake_quantize(x, scheme, qparams)
            assert torch.equal(dequantize(codes, scheme, qparams), y)
            assert torch.equal(fake_quantize(y, scheme, qparams), y)
