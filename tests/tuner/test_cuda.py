"""What is computed on a GPU equals what is computed on the CPU."""

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import ConvNet, inputs_for, seeded
from tuner import TensorScheme, TuningConfig, quantization
from tuner.calibrate import calibrate
from tuner.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from tuner.kernels import snap
from tuner.kernels.graphs import GRAPHS
from tuner.qparams import (
    QParams,
    compute_qparams,
    dequantize,
    fake_quantize,
    grid_of,
    quantize,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = (24, 100)
GRANULARITIES: tuple[Granularity, ...] = (PerTensor(), PerChannel(0), PerGroup(32), PerToken())
NAMES = ("int8", "int4", "e4m3fn", "e5m2", "bf16", "mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "nf4")


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 3
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_numerics(name: str, granularity: Granularity, dtype: torch.dtype) -> None:
    x, scheme = values(dtype), TensorScheme(format=name, granularity=granularity)
    there = fake_quantize(x.cuda(), scheme)
    assert there.is_cuda
    assert there.dtype == dtype
    torch.testing.assert_close(
        there.cpu(), fake_quantize(x, scheme), rtol=0, atol=0, equal_nan=True
    )


def same_bits(there: Tensor, here: Tensor) -> bool:
    nan = here.isnan()
    integers = torch.int16 if here.itemsize == 2 else torch.int32
    bits = [t.contiguous().view(integers).masked_fill(nan, 0) for t in (there.cpu(), here)]
    return torch.equal(there.cpu().isnan(), nan) and torch.equal(*bits)


def many_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return random bits beside normal numbers and halves, enough of them to be fused."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    x = torch.randn(shape, generator=generator) * 3
    halves = torch.randint(-300, 300, shape, generator=generator) / 2
    kind = torch.randint(0, 3, shape, generator=generator)
    return torch.where(kind == 0, bits.view(torch.float32), torch.where(kind == 1, x, halves)).to(
        dtype
    )


FUSED_NAMES = (
    *("int8", "int4", "uint8", "e4m3fn", "e5m2", "e2m1", "bf16", "fp16", "e4m3fnuz", "e4m0"),
    *("e3m4_nosub", "e5m2_overflow", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxint8", "nvfp4"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUSED_NAMES)
def test_fused_kernels(name: str, dtype: torch.dtype) -> None:
    """Bits equal those of the CPU, subnormals and the sign of 0 included, and none fell back."""
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        run = GRAPHS.run
        patch.setattr(GRAPHS, "run", lambda *a, **k: ran.append(run(*a, **k)) or ran[-1])
        for granularity in (*GRANULARITIES, PerChannel(1), PerGroup(5)):
            scheme = TensorScheme(format=name, granularity=granularity)
            for shape in ((700, 320), (701, 203), (4, 9, 3000)):
                x = many_values(shape, dtype)
                qparams = compute_qparams(x.nan_to_num(0, 1, -1), scheme)
                if name.startswith("mx"):
                    assert same_bits(fake_quantize(x.cuda(), scheme), fake_quantize(x, scheme))
                elif name != "nvfp4":
                    there = fake_quantize(x.cuda(), scheme, qparams)
                    assert same_bits(there, fake_quantize(x, scheme, qparams))
                else:
                    grids = grid_of(scheme, qparams, x.cuda()), grid_of(scheme, qparams, x)
                    assert same_bits(snap(x.cuda(), grids[0]), snap(x, grids[1]))
    assert ran
    assert all(ran)
    assert not GRAPHS._broken


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_fused_gradients(granularity: Granularity) -> None:
    scheme = TensorScheme(format="int4", symmetric=False, granularity=granularity)
    x, upstream = many_values((700, 320), torch.float32), torch.randn(700, 320)
    qparams = compute_qparams(x.nan_to_num(0, 1, -1), scheme)
    before, gradients = len(GRAPHS), []
    for device in ("cuda", "cpu"):
        leaf = x.to(device).requires_grad_()
        y = fake_quantize(leaf, scheme, qparams)
        gradients += torch.autograd.grad(y, leaf, upstream.to(device))
    assert same_bits(*gradients)
    assert len(GRAPHS) <= before + 2
    assert not GRAPHS._broken


def test_fused_within_a_cuda_graph() -> None:
    """What is not compiled when recording begins runs one by one; what is, is recorded."""
    x, scheme = torch.randn(700, 320, device="cuda"), TensorScheme(format="e3m2")
    qparams = QParams(0.1)
    expected = fake_quantize(x, scheme, qparams)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        fake_quantize(x, scheme, qparams)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(recorded):
        out = fake_quantize(x, scheme, qparams)
    out.zero_()
    recorded.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["int8", "e4m3fn", "mxfp4", "nf4"])
def test_codes(name: str) -> None:
    x, scheme = values().nan_to_num(), TensorScheme(format=name)
    qparams = compute_qparams(x.cuda(), scheme)
    codes = quantize(x.cuda(), scheme, qparams)
    assert torch.equal(codes.cpu(), quantize(x, scheme, compute_qparams(x, scheme)))
    assert torch.equal(dequantize(codes, scheme, qparams), fake_quantize(x.cuda(), scheme))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_calibration(method: str) -> None:
    x = values().nan_to_num(0.0, 9.0)
    scheme = TensorScheme.model_validate({"format": "int8", "calibration": method})
    there, here = calibrate([x.cuda()], scheme), calibrate([x], scheme)
    assert float(there.scale) == float(here.scale)


@pytest.mark.parametrize("space", ["mixed-int", "fp8", "mx"])
def test_fit(space: str) -> None:
    net = seeded(ConvNet)
    x = inputs_for(net, 16).cuda()
    net = net.cuda()
    with torch.no_grad():
        target = net(x)

    @torch.no_grad()
    def eval_func(model: nn.Module) -> float:
        return 1 - float((model(x) - target).abs().mean() / target.abs().mean())

    config = TuningConfig(space=space, max_trials=4)
    tuned = quantization.fit(net, [x], eval_func, config, progress=False)
    assert tuned(x).is_cuda
    assert tuned.result.best.accuracy is not None
