"""Products that PyTorch's compiler has no right integer kernels for are spelled otherwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner import TuningConfig, quantization
from tuner.exporters.torch_package import has_compiler, load_package

pytestmark = pytest.mark.skipif(
    not has_compiler(), reason="no C++ compiler: packages are NOT tested here"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class OneChannel(nn.Module):
    """Images of one channel, padded by name."""

    def __init__(self, padding: str) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 8, 3, padding=padding, dilation=2)
        self.b = nn.Conv2d(8, 4, (3, 1), padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Temporal(nn.Module):
    """Convolutions along time with activations fused, a residual sum, and what follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 8, 3, padding=1)
        self.b = nn.Conv1d(8, 8, 5, padding=2, groups=2)
        self.c = nn.Conv1d(8, 6, 3, stride=2, dilation=2, bias=False)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.a(x))
        y = torch.cat([F.relu(self.b(y)) + y, F.gelu(y)], 2)[:, :, :13]
        return self.head(self.norm(F.relu(self.c(y)[..., :5]).transpose(1, 2)).flatten(1))


class Weighed(nn.Module):
    """A product of matrices whose terms are weighed."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(8, 6)), nn.Parameter(normal(6, seed=1))
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, alpha=0.5, beta=self.beta)


class Turned(nn.Module):
    """A linear layer over sequences that come first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.permute(1, 0, 2)).mean(0))


class Doubled(nn.Module):
    """What a layer gives, added to itself, weighed or not."""

    def __init__(self, alpha: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(torch.add(y, y, alpha=self.alpha).mean((2, 3)))
        return y + y


@pytest.mark.parametrize(
    ("make", "shape", "space"),
    [
        (lambda: OneChannel("same"), (1, 9, 8), "int8"),
        (lambda: OneChannel("valid"), (1, 9, 8), "int8"),
        (Temporal, (4, 13), "int8"),
        (lambda: Weighed(2.0), (8,), "int8"),
        (lambda: Weighed(0.0), (8,), "int8"),
        (Turned, (5, 8), "int8-dynamic"),
        (lambda: Doubled(1), (3, 6, 6), "int8"),
        (lambda: Doubled(2), (3, 6, 6), "int8"),
    ],
)
def test_a_package_agrees_at_every_batch_size(
    make: Callable[[], nn.Module], shape: tuple[int, ...], space: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = TuningConfig(space=space, target="torch")
    model = quantization.fit(make().eval(), [normal(6, *shape)], config=config)
    assert model.result.quantized_ops
    report = model.export(tmp_path / "out", target="torch", batches=())
    run = load_package(report.files[0])
    with torch.no_grad():
        for count in (1, 3, 8):
            x = normal(count, *shape, seed=count)
            expected = model(x)
            torch.testing.assert_close(run([x])[0], expected, atol=2e-5, rtol=1e-5)


def test_what_lies_otherwise_in_memory_is_read_as_it_is_meant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    images = normal(6, 3, 8, 8).to(memory_format=torch.channels_last)
    config = TuningConfig(target="torch")
    model = quantization.fit(net.eval(), [images], config=config)
    seen: list[Tensor] = []

    def eval_func(artifact: nn.Module) -> float:
        with torch.no_grad():
            seen.append(artifact(images))
        return 1.0

    report = model.export(tmp_path, target="torch", batches=(), eval_func=eval_func)
    run = load_package(report.files[0])
    with torch.no_grad():
        expected = model(images)
        for found in (*seen, *run([images]), *run([images.contiguous()])):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_report_names_what_is_changed_between_quantizer_and_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1),
        nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(72, 6),
        nn.Unflatten(1, (2, 3)),
        nn.GRU(3, 4, batch_first=True),
    )
    model = quantization.fit(net.eval(), [normal(6, 4, 9)], config=TuningConfig(target="torch"))
    report = model.export(tmp_path, target="torch", batches=())
    found = {left.op: left.reason for left in report.left_float}
    assert found == {
        "1": "what it reads is changed after it was quantized (padded, for example)",
        "5": "PyTorch has no integer kernel for GRU on CPU",
    }
    assert "2 integer kernels" in "".join(report.notes)
