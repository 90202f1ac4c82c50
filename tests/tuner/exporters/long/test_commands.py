"""`tuner export` and `tuner bench` as installed commands."""

from pathlib import Path

import pytest

from tests.tuner import test_cli
from tests.tuner.test_cli import tuner


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


def test_export_wants_the_model_and_its_data(folder: Path) -> None:
    tuner(folder, "fit", "mytask:task", "--goal", "5%", "--out", "out")
    done = tuner(folder, "export", "out")
    assert done.returncode == 2
    assert "give MODULE:FUNCTION" in done.stderr
    unknown = tuner(folder, "export", "out", "mytask:task", "--target", "onix")
    assert unknown.returncode == 2
    assert "Did you mean onnx" in unknown.stderr
