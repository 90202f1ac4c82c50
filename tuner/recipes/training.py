"""The one training loop of the built-in recipes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW under a one-cycle learning rate."""

    epochs: int
    batch_size: int
    peak_lr: float
    weight_decay: float = 0.05
    label_smoothing: float = 0.0


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block; outside it stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train(model: nn.Module, inputs: Tensor, targets: Tensor, schedule: Schedule) -> None:
    """Minimize the cross-entropy of `model(inputs)` [..., classes] against `targets` [...].

    The model is left in eval mode.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.peak_lr, weight_decay=schedule.weight_decay
    )
    steps = -(-len(inputs) // schedule.batch_size) * schedule.epochs
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.peak_lr, total_steps=steps)
    model.train()
    with torch.enable_grad():
        for batch in _batches(len(inputs), schedule):
            logits = model(inputs[batch]).flatten(0, -2)
            loss = F.cross_entropy(
                logits, targets[batch].flatten(), label_smoothing=schedule.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    model.eval()


def _batches(count: int, schedule: Schedule) -> Iterator[Tensor]:
    for _ in range(schedule.epochs):
        yield from torch.randperm(count).split(schedule.batch_size)
