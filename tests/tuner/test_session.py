"""What a search says when nothing of it comes back."""

import pytest
import torch
from torch import nn

from tuner import AccuracyGoal, NothingQuantizedWarning, TuningConfig, quantization

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def fp32_has(accuracy: float) -> quantization.EvalFunc:
    return lambda model: accuracy if type(model[0]) is nn.Linear else accuracy - 0.1


@pytest.mark.parametrize(("accuracy", "misses"), [(0.9, True), (0.96, False)])
def test_a_goal_that_fp32_misses_as_well_is_told(accuracy: float, misses: bool) -> None:
    config = TuningConfig(goal=AccuracyGoal(at_least=0.95), max_trials=3)
    with pytest.warns(NothingQuantizedWarning, match="met the goal") as told:
        model = quantization.fit(nn.Sequential(nn.Linear(16, 4)), [X], fp32_has(accuracy), config)
    assert model.result.goal_met is not misses
    assert ("FP32 itself misses it" in str(told[0].message)) is misses
