"""Schemes that PyTorch has integer kernels for, and a small model of a convolution and a layer."""

import torch
from torch import Tensor, nn

from tuner import PerChannel, PerToken, TensorScheme
from tuner.exporters.torch_eager import saturates

# what integer kernels of this CPU take
W8 = TensorScheme(format="int8", granularity=PerChannel(0), reduce_range=saturates())
A8 = TensorScheme(format="uint8", symmetric=False)
S8 = TensorScheme(format="int8")
TOKEN = TensorScheme(format="int8", granularity=PerToken(), dynamic=True)


class Small(nn.Module):
    """A convolution and a layer: two signatures to time."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 2 * channels, 3), nn.Linear(2 * channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))
