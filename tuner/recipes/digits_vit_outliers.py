"""A small vision transformer on handwritten digits, with outlier channels put in.

Large language models grow a few LayerNorm channels of much larger range than the rest (Dettmers
et al., LLM.int8(), NeurIPS 2022, section 4). A small network does not, so they are made here,
without any change of the function: γ and β of some channels times k, and the columns of the next
Linear that read them divided by k.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.recipes.base import Recipe, Task, TrainingParameters
from tuner.recipes.digits import classifier_task
from tuner.recipes.training import Schedule, seeded
from tuner.recipes.transformer import Block

_NAME = "digits-vit-outliers"
_WIDTH, _HEADS, _HIDDEN, _DEPTH = 64, 4, 128, 4
_PATCH, _TOKENS = 2, 16


class OutlierParameters(TrainingParameters):
    """How the network is trained, how many channels are outliers, and how far."""

    epochs: int = Field(default=60, ge=1, le=1000)
    outlier_channels: int = Field(default=4, ge=0, le=_WIDTH)
    outlier_factor: float = Field(default=40.0, gt=0)


class VisionTransformer(nn.Module):
    """Patches of 2 × 2 pixels, pre-norm blocks, the mean token and a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, _WIDTH, _PATCH, _PATCH)
        self.position = nn.Parameter(torch.randn(_TOKENS, _WIDTH) * 0.02)
        self.blocks = nn.ModuleList(
            Block(_WIDTH, _HEADS, _HIDDEN, causal=False) for _ in range(_DEPTH)
        )
        self.norm = nn.LayerNorm(_WIDTH)
        self.fc = nn.Linear(_WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, 1, 8, 8]."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.fc(self.norm(x).mean(1))
        return logits


@torch.no_grad()
def spread(norm: nn.LayerNorm, linear: nn.Linear, channels: Tensor, factor: float) -> None:
    """Scale some channels of `norm` by `factor`, and back in the columns of `linear`."""
    norm.weight[channels] *= factor
    norm.bias[channels] *= factor
    linear.weight[:, channels] /= factor


def _add_outliers(model: VisionTransformer, parameters: OutlierParameters) -> None:
    for block in model.blocks:
        assert isinstance(block, Block)
        for norm, linear in ((block.norm1, block.attention.qkv), (block.norm2, block.fc1)):
            channels = torch.randperm(_WIDTH)[: parameters.outlier_channels]
            spread(norm, linear, channels, parameters.outlier_factor)


def _build(parameters: OutlierParameters) -> Task:
    schedule = Schedule(
        parameters.epochs, batch_size=64, peak_lr=3e-3, weight_decay=0.3, label_smoothing=0.1
    )
    task = classifier_task(_NAME, VisionTransformer, parameters, schedule)
    assert isinstance(task.model, VisionTransformer)
    with seeded(parameters.seed):
        _add_outliers(task.model, parameters)
    return task


RECIPE = Recipe(
    _NAME,
    "A vision transformer with outlier channels on handwritten digits",
    OutlierParameters,
    _build,
)
