"""A causal transformer that predicts the next character of Python source text.

The text is a part of Python's own standard library, which is on every machine; that it differs a
little from one Python version to the next changes the figures a little.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.errors import DataError
from tuner.recipes import cache as weights
from tuner.recipes.base import Recipe, Task, TrainingParameters
from tuner.recipes.training import Schedule, seeded, train
from tuner.recipes.transformer import Block

_NAME = "char-lm"
_WIDTH, _HEADS, _HIDDEN, _DEPTH = 128, 4, 512, 3
_CONTEXT = 128
_TEST_WINDOWS, _CALIBRATION_WINDOWS = 128, 64
# "\n", the printable ASCII characters, and one sign for all others
_OTHER = 96
_VOCABULARY = 97
_TRAIN_MODULES = (
    "argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "doctest",
    "ftplib", "functools", "gettext", "heapq", "imaplib", "inspect", "ipaddress", "locale",
    "mailbox", "optparse", "os", "pickle", "pdb", "platform", "pydoc", "random", "shutil",
    "smtplib", "socket", "statistics", "subprocess", "tarfile", "threading", "typing", "uuid",
)  # fmt: skip
_TEST_MODULES = ("textwrap", "tempfile", "traceback")


class CharLMParameters(TrainingParameters):
    """How long it learns from how many windows of text, and whether its head is its embedding."""

    epochs: int = Field(default=1, ge=1, le=100)
    windows: int = Field(default=8000, ge=1)
    tied: bool = True


class CharLM(nn.Module):
    """Character and position embeddings, pre-norm causal blocks, and a head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.position = nn.Embedding(_CONTEXT, _WIDTH)
        self.blocks = nn.ModuleList(
            Block(_WIDTH, _HEADS, _HIDDEN, causal=True) for _ in range(_DEPTH)
        )
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        nn.init.normal_(self.position.weight, std=0.05)
        nn.init.normal_(self.embedding.weight, std=0.05)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [N, T, vocabulary] of the characters that follow tokens [N, T]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True, eq=False)
class NextCharacterAccuracy:
    """The share of characters in `windows` [N, T + 1] that the model ranks first."""

    windows: Tensor
    batch_size: int = 32

    def __call__(self, model: nn.Module) -> float:
        """Return the model's accuracy in 0…1."""
        with torch.no_grad():
            hits = [
                int((model(batch[:, :-1]).argmax(-1) == batch[:, 1:]).sum())
                for batch in self.windows.split(self.batch_size)
            ]
        return sum(hits) / self.windows[:, 1:].numel()


def encode(text: str) -> Tensor:
    """Return one token per character."""
    return torch.tensor([_token(character) for character in text])


def _token(character: str) -> int:
    if character == "\n":
        return 0
    return ord(character) - 31 if " " <= character <= "~" else _OTHER


def _source(module: str) -> str:
    path = Path(sysconfig.get_path("stdlib"), f"{module}.py")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"recipe {_NAME!r} learns from the source text of Python's standard library, but "
            f"{path} cannot be read: use a Python that has it"
        ) from error


def _windows(modules: tuple[str, ...], count: int) -> Tensor:
    """Return up to `count` windows [count, T + 1], spread evenly over the modules' source."""
    tokens = encode("\n".join(_source(module) for module in modules))
    windows = tokens.unfold(0, _CONTEXT + 1, _CONTEXT)
    picked = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()
    return windows[picked]


def _build(parameters: CharLMParameters) -> Task:
    schedule = Schedule(parameters.epochs, batch_size=16, peak_lr=5e-3)
    text = _windows(_TRAIN_MODULES, parameters.windows)
    with seeded(parameters.seed):
        model = weights.trained(
            CharLM(parameters.tied),
            weights.path_of(_NAME, parameters, text.numpy().tobytes()),
            lambda net: train(net, text[:, :-1], text[:, 1:], schedule),
        )
    test = _windows(_TEST_MODULES, _TEST_WINDOWS)
    return Task(
        model=model.eval(),
        calib_dataloader=text[:_CALIBRATION_WINDOWS, :-1].split(16),
        eval_func=NextCharacterAccuracy(test),
        description=f"{test[:, 1:].numel()} characters of Python source, next-character accuracy",
    )


RECIPE = Recipe(
    _NAME, "A causal character language model on Python source", CharLMParameters, _build
)
