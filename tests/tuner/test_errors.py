"""What other libraries say in their exceptions comes to users, where it is long only in part."""

import pytest
import torch
from torch import nn

from tuner import TuningConfig, quantization
from tuner.errors import DataError, ExportError, brief


def test_short_texts_are_whole() -> None:
    assert brief(ValueError("no such axis\n")) == "ValueError: no such axis"
    assert brief(" no such axis ") == "no such axis"
    assert brief("x" * 1000) == "x" * 1000


def test_of_long_texts_there_are_the_beginning_and_the_end() -> None:
    text = brief(RuntimeError(f"begin {'middle ' * 500}end"))
    assert text.startswith("RuntimeError: begin middle")
    assert text.endswith("middle end")
    assert " […] " in text
    assert len(text) < 1010


def test_tables_of_dispatchers_are_not_shown_but_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 2)).eval()
    with pytest.raises(
        DataError, match=r"refused calibration batch 0.*'SparseCPU' backend"
    ) as caught:
        quantization.fit(model, [torch.eye(4).to_sparse()])
    assert len(str(caught.value)) < 1500
    assert len(str(caught.value.__cause__)) > 5000


class Averaged(nn.Module):
    """Averages rows of a table, in ops that OpenVINO does not convert."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(50, 16, mode="mean"), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


def test_openvino_names_what_it_does_not_convert() -> None:
    pytest.importorskip("openvino")
    ids = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    message = r"OpenVINO refuses the model: it does not convert ReduceMean-\d+, .* of this model$"
    with pytest.raises(ExportError, match=message):
        quantization.fit(Averaged().eval(), [ids], config=TuningConfig(target="openvino"))
