"""A depthwise-separable network of inverted residual blocks on handwritten digits."""

from torch import Tensor, nn

from tuner.recipes.base import Recipe, Task, TrainingParameters
from tuner.recipes.digits import classifier_task
from tuner.recipes.training import Schedule

_NAME = "digits-depthwise"
_STEM = 16
# expansion, output channels, stride of each block
_BLOCKS = (
    (1, 16, 1),
    (4, 24, 1),
    (4, 24, 1),
    (4, 32, 2),
    (4, 32, 1),
    (4, 48, 2),
    (4, 48, 1),
)


class InvertedResidual(nn.Module):
    """Expand 1 × 1, filter 3 × 3 depthwise, project 1 × 1; with a shortcut where shapes agree."""

    def __init__(self, expansion: int, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * channels_in
        self.expand = nn.Sequential() if expansion == 1 else _conv(channels_in, hidden, 1)
        self.depthwise = _conv(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.has_shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [N, channels, H / stride, W / stride]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


class DepthwiseNet(nn.Module):
    """A stem, seven inverted residual blocks, pooling and a classifier: 22 convs and Linears."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv(1, _STEM, 3)
        self.blocks = nn.Sequential()
        channels_in = _STEM
        for expansion, channels, stride in _BLOCKS:
            self.blocks.append(InvertedResidual(expansion, channels_in, channels, stride))
            channels_in = channels
        self.fc = nn.Linear(channels_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, 1, H, W]."""
        logits: Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def _conv(
    channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            channels_in, channels, size, stride, padding=size // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
    )


def _build(parameters: TrainingParameters) -> Task:
    schedule = Schedule(parameters.epochs, batch_size=64, peak_lr=1e-2, label_smoothing=0.1)
    return classifier_task(_NAME, DepthwiseNet, parameters, schedule)


RECIPE = Recipe(
    _NAME, "A depthwise-separable network on handwritten digits", TrainingParameters, _build
)
