"""Bring your own arrays: a known architecture, uploaded weights and data, a built-in metric."""

import zipfile
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tuner.errors import DataError
from tuner.recipes import architectures
from tuner.recipes.assets import NpzId, SafetensorsId, asset_path
from tuner.recipes.base import Parameters, Recipe, Task
from tuner.recipes.metrics import METRICS, Metric

_NAMES = ("calibration", "inputs", "targets")


class ArrayParameters(Parameters):
    """What was uploaded, and how it fits together.

    `data` holds the arrays `calibration` [M, …], `inputs` [N, …] and `targets` [N, …].
    """

    architecture: str = Field(
        description=f"{', '.join(architectures.ARCHITECTURES)}, or another that is registered."
    )
    architecture_params: dict[str, Any] = Field(
        default_factory=dict,
        description='What it asks for; mlp: {"inputs": 64, "hidden": [64], "outputs": 10}.',
    )
    weights: SafetensorsId = Field(description="The state dict, a safetensors file.")
    data: NpzId = Field(description="The arrays calibration, inputs and targets.")
    metric: Literal["accuracy", "top5", "perplexity", "mse", "mae"] = "accuracy"
    batch_size: int = Field(default=256, ge=1, le=65536)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Raise ValueError for an unknown architecture, or parameters that do not fit it."""
        self.built_with()
        return self

    def built_with(self) -> Parameters:
        """Return the parameters of the architecture."""
        architecture = architectures.get(self.architecture)
        try:
            return architecture.parameters.model_validate(self.architecture_params)
        except ValidationError as error:
            reasons = "; ".join(
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
            )
            raise ValueError(
                f"architecture_params do not fit {architecture.name!r}: {reasons}"
            ) from error


@dataclass(frozen=True, eq=False)
class ArrayScore:
    """A metric over all of `inputs`, computed batch by batch."""

    inputs: Tensor
    targets: Tensor
    metric: Metric
    batch_size: int

    def __call__(self, model: nn.Module) -> float:
        """Return the metric of the model's outputs."""
        with torch.no_grad():
            outputs = torch.cat([model(x) for x in self.inputs.split(self.batch_size)])
        return self.metric(outputs, self.targets)


def _build(parameters: ArrayParameters) -> Task:
    arrays = _arrays(parameters.data)
    metric = METRICS[parameters.metric]
    count = len(arrays["inputs"])
    return Task(
        model=_model(parameters).eval(),
        calib_dataloader=arrays["calibration"].split(parameters.batch_size),
        eval_func=ArrayScore(arrays["inputs"], arrays["targets"], metric, parameters.batch_size),
        description=f"{parameters.architecture} on {count} uploaded samples, {parameters.metric}",
        metric=parameters.metric,
        higher_is_better=metric.higher_is_better,
    )


def _model(parameters: ArrayParameters) -> nn.Module:
    architecture = architectures.get(parameters.architecture)
    model = architecture.build(parameters.built_with())
    try:
        model.load_state_dict(load_file(asset_path(parameters.weights)))
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"the weights do not fit {architecture.name!r}: {error}") from error
    return model


def _arrays(asset_id: str) -> dict[str, Tensor]:
    try:
        with np.load(asset_path(asset_id), allow_pickle=False) as file:
            missing = [name for name in _NAMES if name not in file.files]
            if missing:
                raise DataError(
                    f"the data lack {', '.join(missing)}: they hold {', '.join(file.files)}"
                )
            arrays = {name: _tensor(name, file[name]) for name in _NAMES}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"the data cannot be read as npz without pickles: {error}") from error
    if len(arrays["inputs"]) != len(arrays["targets"]):
        raise DataError(
            f"there are {len(arrays['inputs'])} inputs and {len(arrays['targets'])} targets: "
            "give as many of each"
        )
    return arrays


def _tensor(name: str, array: Any) -> Tensor:
    """Return fp32 of floats, int64 of whole numbers."""
    if array.ndim == 0 or not len(array):
        raise DataError(f"the array {name!r} is empty: give samples along its first axis")
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float32))
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype(np.int64))
    raise DataError(f"the array {name!r} is {array.dtype}: give floats or whole numbers")


RECIPE = Recipe("arrays", "Your own weights and data, uploaded", ArrayParameters, _build)
