"""What is computed on a GPU equals what is computed on the CPU."""

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.nets import ConvNet, inputs_for, seeded
from tuner import TensorScheme, TuningConfig, quantization
from tuner.calibrate import calibrate
from tuner.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from tuner.qparams import compute_qparams, dequantize, fake_quantize, quantize

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
