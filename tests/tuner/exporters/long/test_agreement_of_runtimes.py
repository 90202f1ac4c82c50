"""A plan tuned for a runtime says all that it rounds: what is left apart is float arithmetic."""

from pathlib import Path

import pytest

from tuner import TuningConfig, quantization, recipes
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
