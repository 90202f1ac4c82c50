"""The weights that a job began with, so that every later attempt goes on with the same ones.

A study is resumed only with a model of the very same weights. A recipe that trains its model anew
may come to slightly others on another host, or where it is not seeded.
"""

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from server.errors import ServerError
from tuner.costs import named_storage

SUFFIX = ".safetensors"


class WeightsError(ServerError):
    """A recipe no longer builds the model that its job began with."""


def path_of(models_dir: Path, job_id: str) -> Path:
    """Return where the weights of a job are kept until it ends."""
    return models_dir / f"{job_id}{SUFFIX}"


def keep(model: nn.Module, path: Path) -> None:
    """Give the model the weights that are kept at `path`; where there are none, keep its own.

    Raises WeightsError where they are of another architecture, OSError.
    """
    if not path.exists():
        _store(model, path)
    kept, ours = load(path.read_bytes()), named_storage(model)
    if _shapes(kept) != _shapes(ours):
        different = sorted(_shapes(kept).items() ^ _shapes(ours).items(), key=str)
        raise WeightsError(
            f"the recipe builds another model than the one that this job began with: "
            f"{different[0][0]} differs. Was the recipe changed meanwhile? Submit the job again"
        )
    with torch.no_grad():
        for name, tensor in kept.items():
            ours[name].copy_(tensor)


def _store(model: nn.Module, path: Path) -> None:
    """Write all or nothing; what another process wrote meanwhile stays."""
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in named_storage(model).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        staged = Path(folder, path.name)
        staged.write_bytes(save(tensors))
        try:
            os.link(staged, path)
        except FileExistsError:
            return


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
