"""Small networks that between them hold every way an op can be called."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Two convolutions with batch norm, one of them depthwise, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn(self.conv(x)))
        x = F.relu_(self.bn2(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


class Functional(nn.Module):
    """Every functional call site that can be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 16) / 4)
        self.k = nn.Parameter(torch.randn(16, 12) / 4)
        self.qkv = nn.Parameter(torch.randn(48, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w) @ self.k.t()
        q, k, v = (F.linear(y, self.qkv[i * 16 : (i + 1) * 16]) for i in range(3))
        y = torch.bmm(torch.einsum("bid,bjd->bij", q, k).softmax(-1), v)
        z = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        z += y
        return torch.cat([z, y * x], 1)


class Attention(nn.Module):
    """nn.MultiheadAttention with a padding mask, a residual and a norm."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        y, _ = self.attention(x, x, x, key_padding_mask=padding)
        return self.norm(x + y)


class Encoder(nn.Module):
    """nn.TransformerEncoder, whose fused path would bypass its layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Embedding, a stacked bidirectional LSTM and a GRU; a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        y, _ = self.lstm(self.embed(tokens))
        y, _ = self.gru(y)
        return {"logits": self.head(y[:, -1])}


class Tied(nn.Module):
    """A language model whose head shares the embedding's weight; a dataclass comes out."""

    @dataclass
    class Output:
        logits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> "Tied.Output":
        return Tied.Output(self.head(torch.tanh(self.body(self.embed(tokens)))))


class Branching(nn.Module):
    """Control flow on the data, a shared module, a ModuleDict, and a module never called."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"shared": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
        self.never = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> SimpleNamespace:
        for _ in range(2):
            x = torch.tanh(self.parts["shared"](x))
        if float(x[0, 0]) > 2:
            x = self.never(x)
        return SimpleNamespace(hidden=self.parts["other"](x), extra="text")


class Transposed(nn.Module):
    """1-d convolutions, one of them transposed and grouped, each with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 6, 3, groups=2)
        self.bn2 = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)
        self.bn3 = nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.up(self.bn(self.conv(x)).relu_()))
        return self.bn3(self.head(x.mean(-1)))  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """One weight encodes and decodes: output channels of one use are inputs of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.w)) @ self.w


class Mirrored(nn.Module):
    """A convolution and its transpose share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(3, 4, 3, bias=False)
        self.up = nn.ConvTranspose1d(4, 3, 3, bias=False)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))  # type: ignore[no-any-return]


class Pooling(nn.Module):
    """x @ v, as attention pooling scores its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.linspace(-1, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.v


def seeded(net_type: type[nn.Module], **options: object) -> nn.Module:
    """Return a network in eval mode, its weights and running statistics the same each time."""
    torch.manual_seed(0)
    net = net_type(**options).eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return net


def inputs_for(net: nn.Module, samples: int = 8) -> Tensor:
    """Return a batch that the network takes."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(net, (Recurrent, Tied)):
        return torch.randint(0, 20, (samples, 9), generator=generator)
    shapes = {ConvNet: (1, 8, 8), Transposed: (3, 9), Branching: (8,), Mirrored: (3, 9)}
    shapes |= {Autoencoder: (8,), Pooling: (8,)}
    return torch.randn(samples, *shapes.get(type(net), (7, 16)), generator=generator)


def main_output(output: object) -> Tensor:
    """Return the tensor that matters in any of these networks' outputs."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output.hidden  # type: ignore[attr-defined, no-any-return]


ALL = (ConvNet, Functional, Attention, Encoder, Recurrent, Tied, Branching, Transposed)
