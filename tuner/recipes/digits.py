"""scikit-learn's handwritten digits, split for training and test, and how they are scored."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tuner.recipes import cache as weights
from tuner.recipes.base import Task, TrainingParameters
from tuner.recipes.training import Schedule, seeded, train

_TRAIN = 1000
_SPLIT_SEED = 0
_CALIBRATION = 256


@dataclass(frozen=True, eq=False)
class Digits:
    """1797 digits: images [N, 1, 8, 8] with mean 0 and variance 1, labels [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True, eq=False)
class TopOneAccuracy:
    """The share of `images` whose label has the highest logit."""

    images: Tensor
    labels: Tensor
    batch_size: int = 256

    def __call__(self, model: nn.Module) -> float:
        """Return the model's accuracy in 0…1."""
        pairs = zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        )
        with torch.no_grad():
            hits = sum(int((model(x).argmax(-1) == y).sum()) for x, y in pairs)
        return hits / len(self.labels)


@cache
def digits() -> Digits:
    """Return the digits, shuffled once and for all: 1000 to train, 797 to test."""
    from sklearn.datasets import load_digits  # sklearn takes a second to import

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    fit, test = order[:_TRAIN], order[_TRAIN:]
    images = (images - images[fit].mean()) / images[fit].std()
    return Digits(images[fit], labels[fit], images[test], labels[test])


def classifier_task(
    recipe: str,
    architecture: Callable[[], nn.Module],
    parameters: TrainingParameters,
    schedule: Schedule,
) -> Task:
    """Train a classifier of the digits, or take it from the cache, and make a task of it."""
    data = digits()
    with seeded(parameters.seed):
        model = weights.trained(
            architecture(),
            weights.path_of(recipe, parameters, data.train_images.numpy().tobytes()),
            lambda net: train(net, data.train_images, data.train_labels, schedule),
        )
    return Task(
        model=model.eval(),
        calib_dataloader=data.train_images[:_CALIBRATION].split(64),
        eval_func=TopOneAccuracy(data.test_images, data.test_labels),
        description=f"{len(data.test_labels)} handwritten digits of 8 × 8 pixels, top-1 accuracy",
    )
