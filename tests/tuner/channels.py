"""A network whose channels differ in size, and static scales along an axis by torch alone."""

import torch
from torch import Tensor, nn

from tuner import OpConfig, Rule, TensorScheme
from tuner.granularity import Granularity
from tuner.ranges import QParams

SPREAD = torch.tensor([1.0, 30.0, 0.02, 4.0, 0.3])
FLOAT_HEAD = Rule(names=["head"], options=[OpConfig.float()])


class Net(nn.Module):
    """A convolution over five channels of very different size, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def batches(*sizes: int, seed: int = 0) -> list[Tensor]:
    """Return batches of [n, 5, 6, 6], whose positions differ as their channels do."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(0.5, 4, 6)
    return [
        torch.randn(n, 5, 6, 6, generator=generator) * SPREAD[:, None, None] * slope for n in sizes
    ]


def ends(data: list[Tensor], axis: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each slice, by torch alone."""
    parts = torch.cat(data).split(size, axis)
    low, high = zip(*(torch.aminmax(part) for part in parts), strict=True)
    return torch.stack(low), torch.stack(high)


def rounded(x: Tensor, data: list[Tensor], axis: int, size: int) -> Tensor:
    """Round to int8 with power-of-two scales, by torch's own operation."""
    low, high = ends(data, axis, size)
    scale = torch.exp2(torch.ceil(torch.log2(torch.maximum(-low, high) / 127)))
    scale = scale.repeat_interleave(size)[: x.shape[axis]]
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale, zeros, axis % x.ndim, -128, 127)


def po2(granularity: Granularity) -> TensorScheme:
    """Return the scheme that `rounded` computes."""
    return TensorScheme(granularity=granularity, power_of_two_scale=True)


def site_qparams(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points of an op's first input, one for each index of the axis."""
    quantizer = model.get_submodule(name)._tuner_runtime.sites[name].inputs[0]  # type: ignore[union-attr, index]
    qparams = quantizer.qparams
    assert isinstance(qparams, QParams)
    return torch.as_tensor(qparams.scale), qparams.zero_point  # type: ignore[return-value]
