"""Keeping a run from touching what is the user's: the model and the random number generators."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tuner.errors import ModelError, brief


def copied(model: Any) -> nn.Module:
    """Return a deep copy of the model in eval mode; raises ModelError where there can be none."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("model is a ScriptModule, whose ops are out of reach: give the nn.Module")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ModelError("model has lazy modules without weights: call it once on a batch first")
    if any(hasattr(type(module), "_tuner_base") for module in model.modules()):
        raise ModelError(
            "model has a plan on it already (it came from fit() or load()): give the FP32 model"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ModelError("model has parameters on the meta device: load its weights first")
    try:
        return copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"the model cannot be copied ({brief(error)}): a non-leaf tensor or a handle hangs on "
            "it. Remove it, or give the model a __deepcopy__"
        ) from error


@dataclass(frozen=True, eq=False)
class RandomState:
    """The state of Python's, numpy's and torch's generators."""

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> "RandomState":
        """Return the current state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        numpy = np.random.get_state()
        return cls(random.getstate(), numpy, torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        """Set the generators back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(list(self.torch_cuda))


@contextmanager
def isolated_random_state() -> Iterator[RandomState]:
    """Give the generators back as they were, also after an exception."""
    state = RandomState.now()
    try:
        yield state
    finally:
        state.restore()
