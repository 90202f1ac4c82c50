"""Repairs instead of retreats: badly scaled networks keep every op quantized."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tuner import AccuracyGoal, QuantizedModel, SearchSpace, TuningConfig, quantization, recipes
from tuner.recipes import Task
from tuner.repairs import BIAS_ABSORPTION, PROPOSED

_SEED = 0
_LARGEST, _SPREAD = 300.0, 12.0
_HEIGHT = 300.0  # in standard deviations of a channel
_FP32_TOLERANCE = 1e-4  # of the largest output


@pytest.fixture(scope="module")
def rescaled() -> Task:
    """The depthwise network with ReLU, its channels rescaled without a change of its function."""
    task = copy.deepcopy(recipes.get("digits-depthwise").task())
    blocks = task.model.blocks
    for block in blocks:
        for part in (block.expand, block.depthwise):
            if len(part):
                part[2] = nn.ReLU()
    generator = torch.Generator().manual_seed(_SEED)
    for index, block in enumerate(blocks):
        width = block.depthwise[0].out_channels
        spread = _SPREAD ** torch.rand(width, generator=generator)
        _rescale(block.depthwise[1], block.project[0], spread)
        if index in (1, 3):
            factors = torch.ones(width)
            factors[torch.randperm(width, generator=generator)[: width // 8]] = _LARGEST
            _rescale(block.expand[1], block.depthwise[0], factors)
    return task


@torch.no_grad()
def _rescale(norm: nn.BatchNorm2d, conv: nn.Conv2d, factors: Tensor) -> None:
    """Multiply the channels of a norm, and divide what the next layer makes of them."""
    norm.weight *= factors
    norm.bias *= factors
    shape = (-1, 1, 1, 1) if conv.groups > 1 else (1, -1, 1, 1)
    conv.weight /= factors.view(shape)


def tuned(task: Task, max_drop: float, repairs: tuple[str, ...] | None = None) -> QuantizedModel:
    space = SearchSpace() if repairs is None else SearchSpace(repairs=repairs)
    config = TuningConfig(space=space, goal=AccuracyGoal(max_drop=max_drop))
    return quantization.fit(task.model, task.calib_dataloader, task.eval_func, config)


def test_a_badly_scaled_network_is_int8_in_every_op(rescaled: Task) -> None:
    result = tuned(rescaled, 0.005).result
    assert result.goal_met
    assert result.quantized_ops == len(result.best.plan) == 22
    assert result.evaluations <= 1 + 4
    assert tuned(rescaled, 0.005, repairs=()).result.quantized_ops < 22  # the repair does it


def test_a_transformer_with_outlier_channels_is_int8_in_every_op() -> None:
    task = recipes.get("digits-vit-outliers").task()
    repaired, plain = tuned(task, 0.01), tuned(task, 0.01, repairs=())
    result = repaired.result
    assert result.goal_met
    assert result.quantized_ops == len(result.best.plan)
    inputs = [c.inputs[0] for c in result.best.plan.values() if c.weight is not None]
    assert all(s.format == "uint8" and s.granularity.kind == "per_tensor" for s in inputs)
    # the accuracy of one training may survive without repairs, the outputs do not
    assert _error(repaired, task) < 0.05 * _error(plain, task)


@torch.no_grad()
def _error(model: QuantizedModel, task: Task) -> float:
    """Return the mean squared difference from FP32's logits, of plans with every op quantized."""
    first = model.result.trials[0]
    assert first.reason.startswith("uniform W8A8")
    model._parts.model.apply(first.plan)
    batch = next(iter(task.calib_dataloader))
    images = batch[0] if isinstance(batch, tuple | list) else batch
    return float((model(images) - task.model.eval()(images)).square().mean())


@pytest.fixture(scope="module")
def raised() -> Task:
    """The transformer, with channels of its norms moved far from 0 without a change of function."""
    task = copy.deepcopy(recipes.get("digits-vit-outliers").task())
    generator = torch.Generator().manual_seed(_SEED)
    for block in task.model.blocks:
        for norm, linear in ((block.norm1, block.attention.qkv), (block.norm2, block.fc1)):
            width = norm.weight.numel()
            channels = torch.randperm(width, generator=generator)[: width // 8]
            signs = torch.randint(0, 2, (width // 8,), generator=generator) * 2 - 1
            _raise(norm, linear, channels, _HEIGHT * signs * norm.weight[channels].abs())
    return task


@torch.no_grad()
def _raise(norm: nn.LayerNorm, linear: nn.Linear, channels: Tensor, offsets: Tensor) -> None:
    """Add to channels of a norm, and take from the bias of the next layer what it makes of that."""
    norm.bias[channels] += offsets
    linear.bias -= linear.weight[:, channels] @ offsets


def test_a_transformer_with_channels_far_from_zero_is_int8_in_every_op(raised: Task) -> None:
    others = tuple(name for name in PROPOSED if name != BIAS_ABSORPTION)
    absorbed, without = (tuned(raised, 0.01, (*others, *more)) for more in ((BIAS_ABSORPTION,), ()))
    result = absorbed.result
    assert result.goal_met
    assert result.quantized_ops == len(result.best.plan)
    assert result.evaluations == 1 + 1  # uniform int8 does it
    assert sum(BIAS_ABSORPTION in config.recovery for config in result.best.plan.values()) >= 8
    assert without.result.quantized_ops < len(result.best.plan)  # absorption does it
    batch = next(iter(raised.calib_dataloader))
    expected = raised.model(batch)
    absorbed._parts.model.apply({})
    difference = (absorbed.model(batch) - expected).abs().max() / expected.abs().max()
    assert difference <= _FP32_TOLERANCE


def test_the_function_stays_and_without_repairs_there_is_no_trace(rescaled: Task) -> None:
    batch = next(iter(rescaled.calib_dataloader))
    expected = rescaled.model(batch)
    repaired, plain = tuned(rescaled, 0.005), tuned(rescaled, 0.005, repairs=())
    assert any(config.recovery for config in repaired.plan.values())
    repaired._parts.model.apply({})
    difference = (repaired.model(batch) - expected).abs().max() / expected.abs().max()
    assert difference <= _FP32_TOLERANCE
    assert not any(config.recovery for config in plain.plan.values())
    assert not plain._parts.scalings
