"""The models of the benchmark, all trained on real data: built-in recipes and one more."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tuner import recipes
from tuner.recipes import Task
from tuner.recipes.digits_resnet import ResidualBlock

TRAINED = ("digits-resnet", "digits-depthwise", "digits-vit-outliers", "char-lm")
_RESCALE_SEED = 0
_RESCALE_DECADES = 2.0


def resnet_rescaled() -> Task:
    """Return the digits ResNet with channels rescaled inside every block, same function.

    conv1's channel c (γ and β of its batch norm) times s_c > 0, conv2's input channel c divided by
    s_c: relu(s·x) = s·relu(x). Such networks come out of training with batch norm and weight decay
    now and then; per-tensor ranges suffer.
    """
    task = recipes.get("digits-resnet").task()
    generator = torch.Generator().manual_seed(_RESCALE_SEED)
    for block in task.model.modules():
        if isinstance(block, ResidualBlock):
            exponents = torch.rand(block.bn1.num_features, generator=generator) - 0.5
            rescale(block.bn1, block.conv2, 10.0 ** (_RESCALE_DECADES * exponents))
    return task


@torch.no_grad()
def rescale(norm: nn.BatchNorm2d, conv: nn.Conv2d, factors: Tensor) -> None:
    """Multiply the channels of `norm` by `factors` [C], and divide in the conv that reads them."""
    norm.weight *= factors
    norm.bias *= factors
    conv.weight /= factors.view(1, -1, 1, 1)


MODELS: dict[str, Callable[[], Task]] = {
    **{name: recipes.get(name).task for name in TRAINED},
    "resnet-rescaled": resnet_rescaled,
    "minilm": recipes.get("minilm-retrieval").task,
}
