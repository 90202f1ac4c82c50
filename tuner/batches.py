"""Feeding calibration batches to a model."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tuner.errors import DataError
from tuner.tensors import map_tensors, tensors_in

Forward = Callable[[Any, Any], Any]


class Feeder:
    """Calls a model with a batch: a tensor, (inputs, labels), a dict, or a tuple of inputs.

    A mapping is passed by keyword. Of a tuple or list, as many items are passed as `forward`
    requires positional arguments (at least one): what follows is taken for labels.
    `forward(model, batch)` overrides all of this.
    """

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        self._forward = forward
        self._required = max(1, _required_positionals(model))

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return model(batch)."""
        if self._forward is not None:
            return self._forward(model, batch)
        device = next((t.device for t in model.parameters()), torch.device("cpu"))
        args, kwargs = self._arguments(_on_device(batch, device))
        return model(*args, **kwargs)

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, PackedSequence):
            return (batch,), {}
        if isinstance(batch, Mapping):
            return (), dict(batch)
        if isinstance(batch, (list, tuple)):
            if self._required == 1 and isinstance(batch[0], Mapping):
                return (), dict(batch[0])
            return tuple(batch[: self._required]), {}
        return (batch,), {}


def _on_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, PackedSequence):
        return cast(Any, batch).to(device)
    return map_tensors(lambda t: t if t.device == device else t.to(device), batch)


def _required_positionals(model: nn.Module) -> int:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def batch_size(batch: Any) -> int:
    """Return the first dimension of the first tensor that has one, else 1."""
    return next((t.shape[0] for t in tensors_in(batch) if t.dim()), 1)


def read_batches(loader: Iterable[Any], calib_samples: int | None) -> Iterator[Any]:
    """Yield batches of a loader, read once, until `calib_samples` samples are seen."""
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise DataError(
            f"calib_dataloader is a {type(loader).__name__}: give an iterable of batches, "
            "such as a DataLoader or a list of tensors"
        ) from error
    if isinstance(loader, (Tensor, str, bytes, Mapping)):
        raise DataError(
            f"calib_dataloader is a single {type(loader).__name__}: "
            "give an iterable of batches, such as [batch]"
        )
    seen = 0
    for batch in iterator:
        _refuse_empty(batch)
        seen += batch_size(batch)
        yield batch
        if calib_samples is not None and seen >= calib_samples:
            return
    if not seen:
        raise DataError(
            "calib_dataloader is empty: it yielded no batch. Give at least one batch; an iterator "
            "that was read before yields nothing more"
        )


def _refuse_empty(batch: Any) -> None:
    tensors = list(tensors_in(batch))
    if isinstance(batch, (list, tuple, Mapping)) and not len(batch):
        raise DataError("calib_dataloader yielded an empty batch: leave it out")
    if tensors and all(not tensor.numel() for tensor in tensors):
        raise DataError("calib_dataloader yielded a batch without elements: leave it out")
