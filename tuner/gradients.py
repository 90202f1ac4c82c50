"""Forward and backward on parts of a batch: what every op took, and how much its output matters."""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tuner.batches import Feeder, batch_size
from tuner.capture import Capture, CapturedCall, surrogate_loss
from tuner.model import InstrumentedModel
from tuner.tensors import map_tensors

_log = logging.getLogger(__name__)

_SLICE = 32
_MOST = 1e12

Calls = dict[str, list[CapturedCall]]


class GradientPass:
    """Runs a model forward and backward, and captures the calls of the ops that are asked for."""

    def __init__(self, model: InstrumentedModel, feeder: Feeder, seed: int) -> None:
        self._model = model
        self._feeder = feeder
        self._generator = torch.Generator().manual_seed(seed)
        sizes = (m.num_embeddings for m in model.model.modules() if isinstance(m, nn.Embedding))
        self._vocabularies = frozenset(sizes)

    def parts(
        self,
        batch: Any,
        samples: int,
        names: Collection[str],
        fits: Callable[[Calls], bool] = lambda calls: True,
    ) -> Iterator[tuple[Calls, int]]:
        """Yield (calls, samples) of slices of a batch, until so many samples are in.

        It is the whole batch where it has no rows, where the model refuses parts of it, or where
        what they give does not fit.
        """
        for part, size in _slices(batch):
            if samples <= 0:
                return
            calls = self._tried(part, names)
            if calls is None or not fits(calls):
                calls = self._tried(batch, names) or self._captured(batch, names, False)
                size = samples = batch_size(batch)
            yield calls, size
            samples -= size

    def _tried(self, batch: Any, names: Collection[str]) -> Calls | None:
        try:
            return self._captured(batch, names, True)
        except Exception as error:  # the user's model may raise anything on a slice
            _log.debug("the model refused a part of a calibration batch: %s", error)
            return None

    def _captured(self, batch: Any, names: Collection[str], gradients: bool) -> Calls:
        """Run the model forward and backward on a batch; gradients stay None where impossible."""
        model = self._model.model
        capture = Capture(names)
        needed = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            with torch.set_grad_enabled(gradients), self._model.watching(capture), _quiet():
                output = self._feeder(model, batch)
                loss = surrogate_loss(output, batch, self._vocabularies, self._generator)
                if loss is not None:
                    self._backward(loss)
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(needed[name])
        return capture.calls

    def _backward(self, loss: Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            _log.warning(
                "no gradients can be had (%s): predicted damage falls back to output errors",
                str(error).splitlines()[0],
            )


def output_errors(
    reference: Tensor, gradient: Tensor | None, perturbed: Sequence[Tensor]
) -> Tensor:
    """Return g · Δ of each perturbed output, `[perturbed, values]`; NaN counts as 0.

    Without a gradient it is the error relative to the output. What is beyond ±1e12, ±inf too,
    counts as that, so that sums of squares stay finite.
    """
    if gradient is None:
        weight = reference.square().sum().div(max(reference.shape[0], 1)).rsqrt()
    else:
        weight = gradient.float()
    rows = [(found - reference).mul_(weight).flatten() for found in perturbed]
    return torch.nan_to_num(torch.stack(rows)).clamp_(-_MOST, _MOST)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch says of models that look at their values, which they may."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")
        yield


def _slices(batch: Any) -> Iterator[tuple[Any, int]]:
    """Yield (part, samples): runs of the rows of every tensor that has one row a sample."""
    size = batch_size(batch)
    if size <= _SLICE:
        yield batch, size
        return
    for start in range(0, size, _SLICE):
        rows = slice(start, min(start + _SLICE, size))
        part = map_tensors(partial(_rows, size=size, rows=rows), batch)
        yield part, rows.stop - rows.start


def _rows(tensor: Tensor, size: int, rows: slice) -> Tensor:
    return tensor[rows] if tensor.dim() and tensor.shape[0] == size else tensor
