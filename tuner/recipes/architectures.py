"""Models that weights can be uploaded for: the table of architectures."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field
from torch import nn

from tuner.errors import TunerError, UnknownNameError
from tuner.recipes.base import Parameters
from tuner.recipes.digits_depthwise import DepthwiseNet
from tuner.recipes.digits_resnet import ResNet
from tuner.recipes.digits_vit_outliers import VisionTransformer

_MOST_WIDTH = 65536


@dataclass(frozen=True)
class Architecture:
    """A named builder of a model with random weights; `build` takes an instance of `parameters`."""

    name: str
    summary: str
    parameters: type[Parameters]
    build: Callable[[Any], nn.Module]


class ClassifierParameters(Parameters):
    """How many classes are told apart."""

    classes: int = Field(default=10, ge=1, le=_MOST_WIDTH)


class MlpParameters(Parameters):
    """The widths of a multilayer perceptron."""

    inputs: int = Field(ge=1, le=_MOST_WIDTH)
    hidden: tuple[int, ...] = Field(default=(64,), max_length=64)
    outputs: int = Field(ge=1, le=_MOST_WIDTH)


def _mlp(parameters: MlpParameters) -> nn.Module:
    """Return Linear layers with ReLU between them: keys 0.weight, 0.bias, 2.weight, …"""
    widths = (parameters.inputs, *parameters.hidden, parameters.outputs)
    layers: list[nn.Module] = []
    for before, behind in pairwise(widths):
        layers += [nn.Linear(before, behind), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Add an architecture; raises TunerError where another one has its name."""
    known = ARCHITECTURES.get(architecture.name)
    if known not in (None, architecture):
        raise TunerError(f"there is an architecture {architecture.name!r} already: rename this one")
    ARCHITECTURES[architecture.name] = architecture
    return architecture


def get(name: str) -> Architecture:
    """Return the architecture of this name; an unknown one is an error that lists the near ones."""
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]


for _each in (
    Architecture("mlp", "Linear layers with ReLU between them", MlpParameters, _mlp),
    Architecture(
        "digits-resnet",
        "A residual network on images [N, 1, H, W]",
        ClassifierParameters,
        lambda parameters: ResNet(parameters.classes),
    ),
    Architecture(
        "digits-depthwise",
        "Inverted residual blocks on images [N, 1, H, W]",
        ClassifierParameters,
        lambda parameters: DepthwiseNet(parameters.classes),
    ),
    Architecture(
        "digits-vit",
        "A transformer on images [N, 1, 8, 8]",
        ClassifierParameters,
        lambda parameters: VisionTransformer(parameters.classes),
    ),
):
    register(_each)
