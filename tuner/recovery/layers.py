"""The channels of linear and convolutional layers, transposed and grouped ones too."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def input_channels(module: nn.Module) -> int:
    """Return how many channels a layer takes."""
    found = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    assert isinstance(found, int)
    return found


def output_channels(module: nn.Module) -> int:
    """Return how many channels a layer makes."""
    found = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    assert isinstance(found, int)
    return found


def channel_axis(module: nn.Module) -> int:
    """Return the axis of a layer's input and output that holds the channels, from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def output_axis(module: nn.Module) -> int | None:
    """Return the axis of a layer's or norm's output that holds the channels, from the end.

    None where that depends on the input: after BatchNorm1d and GroupNorm.
    """
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        return -3 if isinstance(module, nn.BatchNorm2d) else -4
    has_one = isinstance(module, nn.Linear | _ConvNd | nn.LayerNorm | nn.RMSNorm)
    return channel_axis(module) if has_one else None


def on_output_channels(module: nn.Module, weight: Tensor, factors: Tensor) -> Tensor:
    """Return a layer's weight, each output channel times its factor `[out]`."""
    if not isinstance(module, _ConvTransposeNd):
        return weight * factors.view(-1, *[1] * (weight.dim() - 1))
    groups = module.groups  # [in, out/groups, …]: the channels of one group lie along axis 1
    grouped = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * _of_groups(factors, groups, 2, weight.dim())).view_as(weight)


def on_input_channels(module: nn.Module, weight: Tensor, factors: Tensor) -> Tensor:
    """Return a layer's weight, each input channel times its factor `[in]`."""
    if isinstance(module, _ConvTransposeNd):
        return weight * factors.view(-1, *[1] * (weight.dim() - 1))
    groups = module.groups if isinstance(module, _ConvNd) else 1  # [out, in/groups, …]
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * _of_groups(factors, groups, 2, weight.dim())).view_as(weight)


def input_magnitudes(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the largest magnitude of a layer's weight for each input channel, `[in]`."""
    if isinstance(module, _ConvTransposeNd):
        return weight.abs().flatten(1).amax(1)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    grouped = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.amax((1, 3)).flatten()


def output_magnitudes(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the largest magnitude of a layer's weight for each output channel, `[out]`."""
    if not isinstance(module, _ConvTransposeNd):
        return weight.abs().flatten(1).amax(1)
    grouped = weight.abs().reshape(module.groups, -1, weight.shape[1], weight[0, 0].numel())
    return grouped.amax((1, 3)).flatten()


def _of_groups(factors: Tensor, groups: int, axis: int, axes: int) -> Tensor:
    """Return factors `[groups · n]` as `[groups, 1, n, 1 …]`, n at the axis."""
    shape = [groups, *[1] * axes]
    shape[axis] = factors.numel() // groups
    return factors.view(shape)
