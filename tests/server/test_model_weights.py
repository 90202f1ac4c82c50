"""The weights that a job began with are those of every later attempt."""

from pathlib import Path

import pytest
import torch
from torch import nn

from server.model_weights import WeightsError, keep
from tuner.session import model_signature


def _net(width: int = 3) -> nn.Module:
    tied = nn.Linear(4, 4)
    return nn.Sequential(tied, nn.BatchNorm1d(4), tied, nn.Linear(4, width).half())


def test_the_first_weights_are_given_to_all_others(tmp_path: Path) -> None:
    first, second = _net(), _net()
    path = tmp_path / "models" / "job.safetensors"
    before = model_signature(first)
    keep(first, path)
    assert model_signature(first) == before != model_signature(second)
    keep(second, path)
    assert model_signature(second) == before
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_another_architecture_is_refused_naming_what_differs(tmp_path: Path) -> None:
    keep(_net(), tmp_path / "job.safetensors")
    with pytest.raises(WeightsError, match=r"3\.(bias|weight) differs"):
        keep(_net(width=5), tmp_path / "job.safetensors")


def test_what_another_attempt_wrote_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _net(), _net()
    path = tmp_path / "job.safetensors"
    keep(first, path)
    with monkeypatch.context() as patch:
        answers = iter([False, True])
        patch.setattr(Path, "exists", lambda _: next(answers))
        keep(second, path)
    assert model_signature(second) == model_signature(first)


def test_gradients_and_the_generator_are_left_alone(tmp_path: Path) -> None:
    net, state = _net(), torch.get_rng_state()
    keep(net, tmp_path / "job.safetensors")
    keep(net, tmp_path / "job.safetensors")
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
