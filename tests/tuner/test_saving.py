"""Saved directories: round trip, size, and everything that can be wrong with them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tuner.nets import ALL, Attention, ConvNet, inputs_for, main_output, seeded
from tuner import Plan, QuantizedModel, TuningConfig, quantization
from tuner.errors import ExportError, PlanError, SaveError, TunerError
from tuner.exporters.integer_runner import Runner
from tuner.saving import read_result


def quantized(net: nn.Module, space: str = "mixed-int") -> QuantizedModel:
    config = TuningConfig(space=space)
    return quantization.fit(net, [inputs_for(net, 16)], config=config)


@pytest.mark.parametrize("space", ["int8", "int4-weight-only", "int8-dynamic"])
@pytest.mark.parametrize("net_type", ALL)
def test_round_trip_is_exact(net_type: type[nn.Module], space: str, tmp_path: Path) -> None:
    net = seeded(net_type)
    model = quantized(net, space)
    model.save(tmp_path / "out")
    fresh = net_type().eval()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    again = quantization.load(tmp_path / "out", fresh)
    x = inputs_for(net)
    with torch.no_grad():
        assert torch.equal(main_output(again(x)), main_output(model(x)))
    assert again.plan == model.plan
    assert again.result.to_dict() == model.result.to_dict()
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())
    again.save(tmp_path / "twice")
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("out", "twice")]
    assert weights[0] == weights[1]


def test_partly_quantized_packed_projection(tmp_path: Path) -> None:
    """Of q, k and v in one parameter, one is quantized and two stay float."""
    from tuner import OpConfig, Rule, SearchSpace

    rule = Rule(names=["attention/[qv]_proj"], options=[OpConfig.float()])
    config = TuningConfig(space=SearchSpace(preset="int8", rules=[rule]))
    net = seeded(Attention)
    model = quantization.fit(net, [inputs_for(net, 16)], config=config)
    model.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", Attention().eval())
    x = inputs_for(net)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_bfloat16_model(tmp_path: Path) -> None:
    net = seeded(ConvNet).to(torch.bfloat16)
    x = inputs_for(net).to(torch.bfloat16)
    model = quantization.fit(net, [x])
    model.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", ConvNet().to(torch.bfloat16).eval())
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_the_file_is_as_small_as_the_costs_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    model = quantization.fit(
        net, [torch.randn(8, 512)], config=TuningConfig(space="int4-weight-only")
    )
    model.save(tmp_path / "out")
    size = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert size == pytest.approx(model.result.best.costs["size_bytes"], rel=0.01)
    assert size < 0.15 * model.result.baseline_costs["size_bytes"]


def test_nothing_is_a_pickle_and_json_is_readable(tmp_path: Path) -> None:
    quantized(seeded(ConvNet)).save(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "plan.json", "result.json", "weights.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {"versions", "config", "metrics"} <= set(config)
    Plan.from_json((tmp_path / "out" / "plan.json").read_text())


def test_save_replaces_and_leaves_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    model = quantized(seeded(ConvNet))
    model.save(out)
    model.save(str(out))
    assert (out / "notes.txt").read_text() == "mine"
    quantization.load(out, ConvNet().eval())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing staged is left


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = quantized(seeded(ConvNet))
    with pytest.raises(SaveError, match="cannot save"):
        model.save(tmp_path / "file" / "out")
    with pytest.raises(SaveError, match="cannot save"):
        model.save("/proc/out")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(SaveError, match="Permission"):
            model.save(tmp_path / "locked" / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["weights.safetensors", "plan.json", "config.json", "result.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "altered"])
def test_damaged_directory(name: str, damage: str, tmp_path: Path) -> None:
    out = quantized(seeded(ConvNet)).save(tmp_path / "out")
    path = out / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\0" + data)
    with pytest.raises(SaveError, match=name):
        quantization.load(out, ConvNet().eval())


def test_directories_of_version_0_1_have_no_format_definitions(tmp_path: Path) -> None:
    model = quantized(seeded(ConvNet))
    out = model.save(tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    del config["formats"], config["checksum"]
    (out / "config.json").write_text(json.dumps(config))
    assert quantization.load(out, ConvNet().eval()).plan == model.plan


def test_an_altered_number_of_the_configuration_is_found(tmp_path: Path) -> None:
    out = quantized(seeded(ConvNet)).save(tmp_path / "out")
    text = (out / "config.json").read_text()
    config = json.loads(text)
    assert config["costs"]["size_bytes"] > 0
    (out / "config.json").write_text(json.dumps(config))  # the same in another form
    quantization.load(out, ConvNet().eval())
    config["costs"]["size_bytes"] += 1
    (out / "config.json").write_text(json.dumps(config))
    for read in (lambda: quantization.load(out, ConvNet().eval()), lambda: read_result(out)):
        with pytest.raises(SaveError, match=r"config.json is truncated or altered"):
            read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_of_another_type_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    out = quantized(seeded(ConvNet)).save(tmp_path / "out")
    message = (
        rf"is {str(dtype)[6:]} in this model, and float32 was saved: .*model.to\(torch.float32\)"
    )
    with pytest.raises(PlanError, match=message):
        quantization.load(out, ConvNet().eval().to(dtype))


@pytest.mark.parametrize("directory", [None, 3, ""])
def test_what_is_no_path_is_refused(directory: Any) -> None:
    model = quantized(seeded(ConvNet))
    for call in (lambda: model.save(directory), lambda: quantization.load(directory, ConvNet())):
        with pytest.raises(
            SaveError, match=f"directory is {directory!r}: give the path of a folder"
        ):
            call()


def test_saved_models_and_integer_exports_do_not_replace_each_other(tmp_path: Path) -> None:
    model = quantized(seeded(ConvNet))
    model.save(tmp_path / "saved")
    with pytest.raises(ExportError, match=r"holds a saved model, whose weights.safetensors"):
        model.export(tmp_path / "saved", target="integer")
    quantization.load(tmp_path / "saved", ConvNet().eval())
    model.export(tmp_path / "saved", target="calibration", batches=())  # files of other names
    model.export(tmp_path / "exported", target="integer", batches=())
    with pytest.raises(SaveError, match=r"holds an export for target 'integer', whose weights"):
        model.save(tmp_path / "exported")
    Runner(tmp_path / "exported")


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"QuantizedModel.save"):
        quantization.load(tmp_path / "none", ConvNet())


class _Wider(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 6)


class _Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)


@pytest.mark.parametrize("other", [_Wider, _Narrow, lambda: nn.Sequential(nn.Linear(2, 2))])
def test_another_architecture(other: type[nn.Module], tmp_path: Path) -> None:
    out = quantized(seeded(ConvNet)).save(tmp_path / "out")
    with pytest.raises(PlanError, match="another architecture"):
        quantization.load(out, other())


def test_load_refuses_what_is_no_model(tmp_path: Path) -> None:
    out = quantized(seeded(ConvNet)).save(tmp_path / "out")
    with pytest.raises(TunerError, match="Module"):
        quantization.load(out, "ConvNet")  # type: ignore[arg-type]
