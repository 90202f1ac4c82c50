"""A plan tuned for a runtime says all that it rounds: what is left apart is float arithmetic."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuner import (
    OpConfig,
    PerChannel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
    recipes,
)
from tuner.batches import read_batches


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "integer"])
def test_a_runtime_agrees_as_well_as_the_simulation_with_itself(
    target: str, tmp_path: Path
) -> None:
    """Sums or biases that are rounded otherwise put a fifth of the codes a step apart."""
    task = recipes.get("digits-depthwise").task()
    loader = task.calib_dataloader
    model = quantization.fit(task.model, loader, config=TuningConfig(target=target))
    example = next(iter(read_batches(loader, None)))
    report = model.export(tmp_path, target=target, example_inputs=example, batches=())
    assert report.agreement is not None
    assert report.agreement.max_abs < 1.5 * report.agreement.floor
    assert report.agreement.mean_abs < 3e-3  # logits; 0.02 with the sums or biases of no target
    assert min(layer.equal for layer in report.layers) > 0.9999


class Block(nn.Module):
    """A residual block without its sum's activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


@pytest.mark.parametrize(
    ("target", "told"),
    [("onnxruntime", "rounds 1 biases"), ("integer", "rounds 1 biases"), ("openvino", "1 sums")],
)
def test_a_plan_of_no_target_is_told_what_the_target_rounds(
    target: str, told: str, tmp_path: Path
) -> None:
    byte = TensorScheme(format="uint8", symmetric=False)
    weight = TensorScheme(format="int8", granularity=PerChannel(0))
    rules = [
        Rule(op_types=["Conv2d"], options=[OpConfig(weight=weight, inputs=byte)]),
        Rule(op_types=["add"], options=[OpConfig(inputs=byte)]),
    ]
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    space = TuningConfig(space=SearchSpace(rules=rules))
    model = quantization.fit(Block().eval(), [x], config=space)
    report = model.export(tmp_path / "told", target=target, example_inputs=x, batches=())
    assert any(told in note and f"target={target!r}" in note for note in report.notes)
    tuned = quantization.fit(Block().eval(), [x], config=TuningConfig(target=target))
    report = tuned.export(tmp_path / "tuned", target=target, example_inputs=x, batches=())
    assert not any("is tuned with target" in note for note in report.notes)
