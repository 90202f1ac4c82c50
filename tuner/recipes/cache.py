"""Trained weights kept between runs, as safetensors files in the user's cache folder."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from tuner.recipes.base import Parameters
from tuner.saved_files import cache_folder

_log = logging.getLogger(__name__)


def path_of(recipe: str, parameters: Parameters, data: bytes) -> Path:
    """Return where a recipe's weights are kept.

    The name changes with the parameters, the training data and the version of torch.
    """
    facts = [recipe, parameters.model_dump(mode="json"), torch.__version__]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + data).hexdigest()
    return cache_folder() / f"{recipe}-{digest[:16]}.safetensors"


def trained(model: nn.Module, path: Path, train: Callable[[nn.Module], None]) -> nn.Module:
    """Load the model's weights from `path`; where they are not there, train and keep them.

    A file that cannot be read is replaced; a folder that cannot be written is no error.
    """
    if not _load(model, path):
        train(model)
        _store(model, path)
    return model


def _load(model: nn.Module, path: Path) -> bool:
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        _log.debug("no cached weights at %s: %s", path, error)
        return False
    return True


def _store(model: nn.Module, path: Path) -> None:
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            partial = Path(file.name)
            file.write(save(state))
        partial.replace(path)
    except OSError as error:
        _log.debug("cannot keep the trained weights at %s: %s", path, error)
        if partial is not None:
            partial.unlink(missing_ok=True)
