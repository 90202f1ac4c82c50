"""Models of the sizes that people deploy, randomly initialised: for times and sizes of exports."""

import argparse
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
_INVERTED = (  # how many times wider within, channels, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum, as in ResNet-18 (He et al., CVPR 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(f(x) + shortcut(x))."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """The shape of ResNet-18 for images [N, 3, 224, 224]; returns logits [N, classes]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        blocks: list[nn.Module] = []
        channels = 64
        for out, stride in _STAGES:
            blocks += [BasicBlock(channels, out, stride), BasicBlock(out, out, 1)]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        x = self.pool(torch.relu(self.bn1(self.conv1(image))))
        logits: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """Widens, convolves channel by channel, narrows (MobileNetV2, Sandler et al., CVPR 2018)."""

    def __init__(self, channels: int, out: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = channels * factor
        widening = [convolution(channels, wide, 1)] if factor != 1 else []
        self.layers = nn.Sequential(
            *widening,
            convolution(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.has_shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x) where the shapes allow it, else f(x)."""
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


def convolution(channels: int, out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """Return a convolution with batch norm and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU6(),
    )


class MobileNetV2(nn.Module):
    """The shape of MobileNetV2 for images [N, 3, 224, 224]; returns logits [N, classes]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 32
        for factor, out, count, stride in _INVERTED:
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, out, step, factor))
                channels = out
        self.features = nn.Sequential(convolution(3, 32, 3, 2), *blocks, convolution(320, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(self.features(image).mean((2, 3)))
        return logits


def resnet18(seed: int = 0, classes: int = 1000) -> nn.Module:
    """Return a ResNet-18 with random weights, whose batch norms have seen random images."""
    torch.manual_seed(seed)
    return _normalized(ResNet18(classes))


def mobilenet_v2(seed: int = 0, classes: int = 1000) -> nn.Module:
    """Return a MobileNetV2 with random weights, whose batch norms have seen random images."""
    torch.manual_seed(seed)
    return _normalized(MobileNetV2(classes))


@torch.no_grad()
def _normalized(model: nn.Module) -> nn.Module:
    for _ in range(3):
        model(torch.randn(4, 3, 224, 224))
    return model.eval()


class CausalLM(nn.Module):
    """A causal language model of transformers; tokens [N, T] give the logits [N, T, words]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next token."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def distilgpt2(seed: int = 0) -> nn.Module:
    """Return the shape of DistilGPT2, 82 million parameters, with random weights."""
    # transformers takes seconds to import
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return CausalLM(GPT2LMHeadModel(GPT2Config(n_layer=6))).eval()


def pythia_70m(seed: int = 0) -> nn.Module:
    """Return the shape of Pythia-70M, whose head has a table of its own, with random weights."""
    # transformers takes seconds to import
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 50304}
    config = GPTNeoXConfig(num_hidden_layers=6, num_attention_heads=8, **sizes)
    return CausalLM(GPTNeoXForCausalLM(config)).eval()


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet-v2": mobilenet_v2,
    "distilgpt2": distilgpt2,
    "pythia-70m": pythia_70m,
}
"""The models by name."""

_LANGUAGE_MODELS = ("distilgpt2", "pythia-70m")
_WORDS, _SEQUENCE = 50257, 128


def random_inputs(name: str, seed: int) -> Tensor:
    """Return 16 inputs of a model: images [N, 3, 224, 224], or tokens [N, 128]."""
    generator = torch.Generator().manual_seed(seed)
    if name in _LANGUAGE_MODELS:
        return torch.randint(_WORDS, (16, _SEQUENCE), generator=generator)
    return torch.randn(16, 3, 224, 224, generator=generator)


def arguments_of(description: str | None, models: Iterable[str], trials: int) -> argparse.Namespace:
    """Return what the command line asks for: models, targets, a space, trials."""
    names = (*RANDOM, *models)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--targets", nargs="+", default=["onnxruntime", "openvino", "torch"])
    parser.add_argument("--space", default="int8")
    parser.add_argument("--trials", type=int, default=trials, help="at most, for each tuning")
    return parser.parse_args()
