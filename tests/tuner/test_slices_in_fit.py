"""Static scales along an axis of activations: found by fit(), stored, saved, loaded and swept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tuner.channels import Net, batches, po2, rounded, site_qparams
from tuner import (
    AccuracyGoal,
    OpConfig,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizedModel,
    Rule,
    SearchSpace,
    TensorScheme,
    TuningConfig,
    quantization,
)
from tuner.errors import SaveError
from tuner.granularity import Granularity
from tuner.observe import CalibratedRanges, Observer
from tuner.operands import OUTPUT


def searched(
    scheme: TensorScheme, data: list[Tensor], samples: int = 32, **options: Any
) -> QuantizedModel:
    """Fit with one option per op, judged by its agreement with FP32."""
    net = Net()
    x = batches(samples, seed=3)[0]
    with torch.no_grad():
        reference = net(x)

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x) - reference).norm())

    weight = TensorScheme(granularity=PerChannel(0))
    config = TuningConfig(
        space=SearchSpace(rules=[Rule(options=[OpConfig(weight=weight, inputs=scheme)])]),
        goal=AccuracyGoal(at_most=1e9, higher_is_better=False),
        max_trials=2,
    )
    return quantization.fit(net, data, error, config, **options)


@pytest.mark.parametrize("granularity", [PerChannel(1), PerGroup(2, axis=1)], ids=repr)
def test_fit_predicts_saves_and_loads_them(granularity: Granularity, tmp_path: Path) -> None:
    data, scheme = batches(40, 8), po2(granularity)
    size = granularity.size if isinstance(granularity, PerGroup) else 1
    found = searched(scheme, data)
    assert found.plan["conv"].inputs == (scheme,)
    assert all(row.predicted_damage > 0 for row in found.result.op_table)
    assert "per-group of 2" in repr(found.model) or size == 1
    x = batches(7, seed=1)[0]
    plain = Net()
    with torch.no_grad():
        for layer in (plain.conv, plain.head):
            rows = layer.weight.flatten(1).abs().amax(1) / 127
            zeros = torch.zeros(len(rows), dtype=torch.int32)
            layer.weight.copy_(
                torch.fake_quantize_per_channel_affine(layer.weight, rows, zeros, 0, -128, 127)
            )
        hidden = [F.relu(Net().conv(batch)).mean((2, 3)) for batch in data]
        mean = F.relu(plain.conv(rounded(x, data, 1, size))).mean((2, 3))
        expected = plain.head(rounded(mean, hidden, 1, size))
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)

        found.save(tmp_path / "a")
        loaded = quantization.load(tmp_path / "a", Net())
        assert torch.equal(loaded(x), found(x))
        assert repr(loaded.model) == repr(found.model)
        loaded.save(tmp_path / "b")
        assert torch.equal(quantization.load(tmp_path / "b", Net())(x), found(x))
    stored = load_file(tmp_path / "a" / "weights.safetensors")["activations.scale"]
    slices = -(-5 // size) + -(-6 // size)
    assert stored.shape == (slices,)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["activations"] == [
        ["conv", 0, -(-5 // size)],
        ["head", 0, -(-6 // size)],
    ]
    per_tensor = searched(po2(PerTensor()), data).result.best.costs["size_bytes"]
    assert found.result.best.costs["size_bytes"] - per_tensor == (slices - 2) * 8


def test_affine_zero_points_survive_saving(tmp_path: Path) -> None:
    data = [batch + torch.arange(-2, 3)[:, None, None] for batch in batches(8)]
    found = searched(TensorScheme(symmetric=False, granularity=PerChannel(1)), data)
    found.save(tmp_path)
    loaded = quantization.load(tmp_path, Net())
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), found(data[0]))
    zero_points = site_qparams(loaded.model, "conv")[1]
    assert zero_points is not None
    assert len(set(zero_points.tolist())) > 1


def test_a_directory_with_another_number_of_scales_is_damaged(tmp_path: Path) -> None:
    searched(TensorScheme(granularity=PerChannel(1)), batches(8)).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["checksum"]
    config["activations"][0][2] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SaveError, match=r"config.json is damaged: .* 12 scales .* holds 11"):
        quantization.load(tmp_path, Net())


def test_a_resumed_study_judges_with_the_stored_scales(tmp_path: Path) -> None:
    storage = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "slices"}
    scheme = TensorScheme(format="uint8", symmetric=False, granularity=PerChannel(1))
    first = searched(scheme, batches(8), **storage)
    other = [100 * batch for batch in batches(8, seed=5)]
    again = searched(scheme, other, **storage)
    anew = searched(scheme, other)
    x = batches(7, seed=1)[0]
    with torch.no_grad():
        assert torch.equal(again(x), first(x))
        assert not torch.equal(anew(x), first(x))


def test_entries_of_numbers_and_of_lists_are_adopted() -> None:
    whole, channels = TensorScheme(), TensorScheme(granularity=PerChannel(1), symmetric=False)
    ranges = CalibratedRanges(Observer({}))
    entries: list[list[Any]] = [
        ["a", 0, whole.model_dump(mode="json"), 0.1, None],
        ["b", OUTPUT, channels.model_dump(mode="json"), [0.5, 0.1], [3, -4]],
    ]
    ranges.adopt(json.loads(json.dumps(entries)))
    assert torch.equal(torch.as_tensor(ranges.qparams("a", 0, whole).scale), torch.tensor(0.1))
    qparams = ranges.qparams("b", OUTPUT, channels)
    assert torch.equal(torch.as_tensor(qparams.scale), torch.tensor([0.5, 0.1]))
    kept = ranges.entries([("a", 0, whole), ("b", OUTPUT, channels)])
    again = CalibratedRanges(Observer({}))
    again.adopt(json.loads(json.dumps(kept)))
    assert again.entries([("a", 0, whole), ("b", OUTPUT, channels)]) == kept


def test_sweep_takes_them() -> None:
    data = batches(16)
    config = OpConfig(inputs=TensorScheme(format="int4", granularity=PerChannel(1)))
    whole = OpConfig(inputs=TensorScheme(format="int4"))
    net = Net()
    with torch.no_grad():
        reference = net(data[0])
        result = quantization.sweep(
            net,
            data,
            lambda m: -float((m(data[0]) - reference).norm()),
            [("channels", config), ("whole", whole)],
            parts=["inputs"],
        )
    channels, tensor = (row.accuracy for row in result.rows)
    assert channels is not None
    assert tensor is not None
    assert tensor < channels < 0


def test_scales_along_the_axis_of_samples_work_where_all_batches_are_equal() -> None:
    found = searched(TensorScheme(granularity=PerChannel(0)), batches(40, 40), samples=40)
    assert all(row.predicted_damage > 0 for row in found.result.op_table)
