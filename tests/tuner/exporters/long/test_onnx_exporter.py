"""The onnx and onnxruntime targets: files, checks, figures, and errors that help."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.exporters.onnx_nets import A8, W8, Branches, floats, only, request, scheme
from tuner import OpConfig, PerChannel
from tuner.errors import ExportError
from tuner.exporters import onnx_file
from tuner.exporters.onnx_exporter import OnnxExporter, OnnxRuntimeExporter
from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.staging import file_of
from tuner.exporters.targets import exporter

BETWEEN = OpConfig(weight=W8, inputs=A8, output=A8)
OPEN = OpConfig(weight=W8, inputs=A8)
ALONE = OpConfig(weight=W8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Branches(
        integer=nn.Conv1d(5, 64, 3),
        open=nn.Conv1d(5, 64, 3),
        alone=nn.Conv1d(5, 64, 3),
        large=nn.Linear(32, 512),
    )


SPACE = only({"integer": BETWEEN, "open": OPEN, "alone": ALONE, "large": OPEN})


def test_a_report_says_what_came_out(tmp_path: Path) -> None:
    asked = request(net(), floats(4, 5, 32), tmp_path / "new" / "folder", SPACE, batches=(1, 3))
    seen: list[int] = []

    def evaluate(run: object) -> float:
        outputs = run([floats(9, 5, 32)])  # type: ignore[operator]
        seen.append(len(outputs))
        return 0.25

    asked = type(asked)(**{**vars(asked), "evaluate": evaluate})
    report = OnnxRuntimeExporter().export(asked)
    path = tmp_path / "new" / "folder" / "model.onnx"
    assert report.files == (path,)
    assert report.size_bytes == path.stat().st_size
    assert 0.25 < (report.size_ratio or 0) < 0.45
    assert report.agreement is not None
    assert report.agreement.samples == 4
    assert report.agreement.max_abs < 0.02
    assert [entry.batch for entry in report.latency] == [1, 3]
    assert all(entry.float_ms > 0 and entry.quantized_ms > 0 for entry in report.latency)
    assert (report.metric, seen) == (0.25, [4])
    left = {entry.op: entry.reason for entry in report.left_float}
    assert set(left) == {"open", "alone"}
    assert "goes on in float" in left["open"]
    assert "input 0" in left["alone"]
    loaded = OnnxRuntimeSession(path).run(asked.traced.example.tensors)
    assert len(loaded) == len(asked.traced.outputs)


def test_kernels_that_are_off_by_more_than_a_step_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), floats(4, 8), tmp_path, batches=()
    )
    plain = OnnxRuntimeSession.run

    def saturating(self: OnnxRuntimeSession, tensors: list[Tensor]) -> list[Tensor]:
        found = plain(self, tensors)
        return [f // 2 if f.dtype == torch.uint8 else f for f in found]

    monkeypatch.setattr(OnnxRuntimeSession, "run", saturating)
    with pytest.raises(ExportError, match="steps from the simulation"):
        OnnxExporter().export(asked)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = request(nn.Linear(8, 4), floats(4, 8), tmp_path / "file" / "model.onnx", batches=())
    with pytest.raises(ExportError, match="Choose a path that can be written"):
        OnnxExporter().export(asked)


def test_a_batch_of_one_is_enough(tmp_path: Path) -> None:
    asked = request(nn.Linear(8, 4), floats(1, 8), tmp_path / "one.onnx", batches=())
    report = OnnxExporter().export(asked)
    assert report.files == (tmp_path / "one.onnx",)
    assert report.agreement is not None
    assert report.agreement.max_abs < 1e-5
    assert OnnxRuntimeSession(report.files[0]).run([floats(6, 8)])[0].shape == (6, 4)


def test_paths_are_files_or_folders() -> None:
    assert file_of(Path("a/b.onnx"), ".onnx") == Path("a/b.onnx")
    assert file_of(Path("a/b"), ".onnx") == Path("a/b/model.onnx")


def test_the_onnx_target_says_what_it_can_express() -> None:
    torch.manual_seed(0)
    asked = request(nn.Linear(8, 4), floats(4, 8), Path())
    op = asked.ops[""]
    onnx = exporter("onnx")
    assert onnx.why_not(op, OpConfig(weight=W8, inputs=scheme("int16"))) is None
    why = onnx.why_not(op, OpConfig(weight=scheme("mxfp4"), inputs=A8))
    assert why is not None
    assert "ONNX has no mxfp4" in why
    with_int4 = OpConfig(weight=scheme("int4", PerChannel(0)))
    assert onnx.why_not(op, with_int4) is None
    assert exporter("onnxruntime").why_not(op, with_int4) is None


@pytest.mark.parametrize("target", ["onnx", "onnxruntime", "openvino"])
def test_constants_too_large_for_one_file_lie_beside_it(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered: 2 GB take minutes. FP32 in the same runtime is as large, and timed."""
    whole = exporter(target).export(request(net(), floats(4, 5, 32), tmp_path / "one", SPACE))
    monkeypatch.setattr(onnx_file, "_EXTERNAL_BYTES", 10_000)
    path = tmp_path / "two" / "model.onnx"
    report = exporter(target).export(request(net(), floats(4, 5, 32), path, SPACE, batches=(1,)))
    _, data = report.files
    assert report.files[0] == path
    assert data.parent == path.parent
    assert data.stat().st_size > 10_000 > path.stat().st_size / 10
    assert report.size_bytes == path.stat().st_size + data.stat().st_size
    assert report.float_size_bytes == pytest.approx(whole.float_size_bytes, rel=0.2)
    assert report.agreement == whole.agreement
    assert report.layers == whole.layers
    assert report.left_float == whole.left_float
    assert len(report.latency) == 1
    moved = tmp_path / "moved"
    path.parent.rename(moved)
    found = OnnxRuntimeSession(moved / "model.onnx").run([floats(4, 5, 32)])
    expected = OnnxRuntimeSession(whole.files[0]).run([floats(4, 5, 32)])
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
