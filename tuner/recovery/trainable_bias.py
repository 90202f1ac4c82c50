"""The quantized bias of an op while it is trained."""

from collections.abc import Callable

import torch
from torch import Tensor

from tuner.biases import counts_products
from tuner.granularity import PerChannel
from tuner.qparams import fake_quantize
from tuner.ranges import QParams
from tuner.schemes import OpConfig

Steps = Callable[[], Tensor]
"""Returns input scale × weight scale, in fp64: one value, or one for each weight channel."""


def rounded_bias(bias: Tensor, config: OpConfig, steps: Steps) -> Tensor:
    """Return the bias rounded as `BiasStore` rounds it, the gradient passed straight through."""
    assert config.bias is not None
    if not counts_products(config):
        return fake_quantize(bias, config.bias)
    scheme = config.bias.model_copy(update={"granularity": PerChannel(0)})
    with torch.no_grad():
        each = steps().double().reshape(-1)  # a grouped transposed layer has one a group
        each = each.repeat(bias.numel() // max(each.numel(), 1))
    return fake_quantize(bias.double(), scheme, QParams(each)).to(bias.dtype)
