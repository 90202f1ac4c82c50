"""`tuner export` and `tuner bench` as installed commands."""

from pathlib import Path

import pytest

from tests.tuner import test_cli
from tests.tuner.test_cli import tuner
from tuner.exporters.torch_package import has_compiler

_COMPILES_S = 600
needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="no C++ compiler: packages are NOT tested here"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mytask.py").write_text(test_cli._TASK)
    return tmp_path


def test_export_and_bench_of_what_was_saved(folder: Path) -> None:
    assert tuner(folder, "fit", "mytask:task", "--goal", "5%", "--out", "out").returncode == 0
    done = tuner(folder, "export", "out", "mytask:task", "--target", "onnxruntime", "--evaluate")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "Agreement with the simulation",
        "Latency at batch 8",
        "eval_func on the artifact",
    ):
        assert words in done.stdout
    assert (folder / "out" / "onnxruntime" / "model.onnx").exists()
    timed = tuner(folder, "bench", "out", "mytask:task", "--batch", "2")
    assert timed.returncode == 0, timed.stderr
    for words in ("FP32 torch, ms", "quantized onnxruntime, ms", "×"):
        assert words in timed.stdout


@needs_compiler
def test_pytorch_is_a_runtime_with_its_baselines(folder: Path) -> None:
    assert tuner(folder, "fit", "mytask:task", "--goal", "5%", "--out", "out").returncode == 0
    asked = "out", "mytask:task", "--target", "torch", "--batch", "2"
    done = tuner(folder, "export", *asked, "--bf16", timeout_s=_COMPILES_S)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "torch-bf16" / "model.pt2").exists()
    for words in ("Exported for torch-bf16", "FP32 compiled", "BF16 compiled", "Layer by layer"):
        assert words in done.stdout
    timed = tuner(folder, "bench", *asked, timeout_s=_COMPILES_S)
    assert timed.returncode == 0, timed.stderr
    for words in ("FP32 eager, ms", "FP32 compiled, ms", "quantized compiled, ms", "×"):
        assert words in timed.stdout
    refused = tuner(folder, "export", "out", "mytask:task", "--target", "openvino", "--bf16")
    assert refused.returncode == 2
    assert "give --bf16 with --target torch" in refused.stderr


def test_export_wants_the_model_and_its_data(folder: Path) -> None:
    tuner(folder, "fit", "mytask:task", "--goal", "5%", "--out", "out")
    done = tuner(folder, "export", "out")
    assert done.returncode == 2
    assert "give MODULE:FUNCTION" in done.stderr
    unknown = tuner(folder, "export", "out", "mytask:task", "--target", "onix")
    assert unknown.returncode == 2
    assert "Did you mean onnx" in unknown.stderr
