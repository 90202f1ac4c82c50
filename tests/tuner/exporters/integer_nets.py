"""Small models, quantized and exported as integers."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tuner import OpConfig, PerChannel, Rule, SearchSpace, TensorScheme, TuningConfig, quantization
from tuner.example import Example
from tuner.exporters.base import ExportRequest
from tuner.exporters.integer_exporter import IntegerExporter
from tuner.exporters.report import ExportReport
from tuner.exporters.tracing import trace
from tuner.quantized_model import QuantizedModel

W8 = TensorScheme(format="int8", granularity=PerChannel(0))
A8 = TensorScheme(format="uint8", symmetric=False)
INT8, INT16 = TensorScheme(format="int8"), TensorScheme(format="int16")


class Net(nn.Module):
    """Convolutions of all kinds with clamps between them, a residual sum, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        y = nn.functional.relu6(self.depthwise(x)) + x
        y = torch.relu_(self.grouped(y))
        y = nn.functional.max_pool2d(self.up(y), 2)
        return self.head(y.mean((2, 3)))


class Words(nn.Module):
    """Embeddings and causal attention, whose lengths change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.down(nn.functional.gelu(self.up(x))) @ self.embed.weight.T


def image(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def tokens(n: int = 4, length: int = 6) -> Tensor:
    return torch.randint(0, 17, (n, length), generator=torch.Generator().manual_seed(1))


def fitted(model: nn.Module, data: Tensor, space: object = "int8") -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        return quantization.fit(model.eval(), [data], config=TuningConfig(space=space))


def exported(model: QuantizedModel, data: Tensor, path: Path) -> ExportReport:
    parts = model._parts
    traced = trace(parts.model, Example.of_batch(model.model, data))
    request = ExportRequest(traced, model.plan, dict(parts.model.ops), path)
    return IntegerExporter().export(request)


def rules(**schemes: object) -> SearchSpace:
    """Return a space in which every op has this one choice."""
    return SearchSpace(preset="int8", rules=[Rule(names=["*"], options=[OpConfig(**schemes)])])


@cache
def net() -> QuantizedModel:
    return fitted(Net(), image(16))


@cache
def words() -> QuantizedModel:
    return fitted(Words(), tokens(16))


def layer_by_layer(**configs: OpConfig) -> SearchSpace:
    """Return a space in which each layer has a choice of its own."""
    each = [Rule(names=[name], options=[config]) for name, config in configs.items()]
    return SearchSpace(preset="int8", rules=each)


def graph_of(folder: Path) -> dict:
    return json.loads((folder / "graph.json").read_text())
