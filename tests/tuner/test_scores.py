"""What eval_func may return."""

import numpy as np
import pytest
import torch

from tuner.errors import EvaluationError
from tuner.scores import read_score


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        np.float32(0.5),
        np.float64(0.5),
        torch.tensor(0.5),
        np.array(0.5),
        torch.tensor(0.5).half(),
    ],
)
def test_numbers(value: object) -> None:
    assert read_score(value, None).accuracy == 0.5


@pytest.mark.parametrize("value", [1, np.int64(1), torch.tensor(1)])
def test_integers(value: object) -> None:
    assert read_score(value, None).accuracy == 1.0


@pytest.mark.parametrize(
    "value", [[0, 1], (0.0, 1.0), np.array([0, 1]), torch.tensor([False, True])]
)
def test_per_sample_scores(value: object) -> None:
    score = read_score(value, None)
    assert score.accuracy == 0.5
    assert score.samples == (0.0, 1.0)


def test_mapping() -> None:
    score = read_score({"loss": torch.tensor(2.0), "top1": 0.75}, "top1")
    assert score.accuracy == 0.75
    assert score.metrics == {"loss": 2.0, "top1": 0.75}
    assert read_score({"only": 3}, None).accuracy == 3.0


@pytest.mark.parametrize(
    ("value", "metric", "says"),
    [
        (None, None, "None"),
        ("0.9", None, "'0.9'"),
        (1 + 2j, None, "complex"),
        (torch.tensor(1j), None, "complex"),
        (True, None, "bool"),
        (float("nan"), None, "finite"),
        (torch.tensor(float("inf")), None, "finite"),
        ([], None, "no sample"),
        (torch.zeros(2, 2), None, r"shape \[2, 2\]"),
        (torch.zeros(2, dtype=torch.complex64), None, "complex64"),
        ([0.1, "x"], None, "list"),
        ([0.1, float("nan")], None, "finite"),
        ({"a": 1.0, "b": 2.0}, None, "name the one"),
        ({"a": 1.0}, "b", "name the one"),
        ({"a": "x"}, "a", "'x'"),
        ({}, None, "none"),
    ],
)
def test_anything_else_is_refused(value: object, metric: str | None, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        read_score(value, metric)
