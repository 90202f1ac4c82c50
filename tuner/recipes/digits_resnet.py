"""A residual network with batch norm on handwritten digits."""

import torch.nn.functional as F
from torch import Tensor, nn

from tuner.recipes.base import Recipe, Task, TrainingParameters
from tuner.recipes.digits import classifier_task
from tuner.recipes.training import Schedule

_NAME = "digits-resnet"
_WIDTHS = (16, 32, 64)
_BLOCKS_PER_STAGE = 2


class ResidualBlock(nn.Module):
    """relu(x' + bn2(conv2(relu(bn1(conv1(x)))))), x' projected where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [N, channels, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


class ResNet(nn.Module):
    """A stem, three stages of residual blocks, global average pooling and a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], stride=1)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], stride=2)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], stride=2)
        self.fc = nn.Linear(_WIDTHS[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, 1, H, W]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels_in, channels, stride)
    rest = (ResidualBlock(channels, channels, 1) for _ in range(_BLOCKS_PER_STAGE - 1))
    return nn.Sequential(first, *rest)


def _build(parameters: TrainingParameters) -> Task:
    schedule = Schedule(parameters.epochs, batch_size=64, peak_lr=1e-2, label_smoothing=0.1)
    return classifier_task(_NAME, ResNet, parameters, schedule)


RECIPE = Recipe(_NAME, "A residual network on handwritten digits", TrainingParameters, _build)
