"""What training under a plan brings back: LSQ of the digits ResNet at 4 and 2 bits, all ops."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tuner import PerChannel, TensorScheme
from tuner.recipes import digits_resnet
from tuner.recipes.digits import digits
from tuner.trainable_preparation import prepare_qat
from tuner.training import fit_qat

RAW = Path(__file__).parent / "raw" / "qat" / "digits-resnet.jsonl"
ALLOWED = {4: 0.005, 2: 0.03}
"""Bits of weights and inputs → how much accuracy may be lost, in absolute terms."""

LEARNING_RATE, BATCH, SMOOTHING = 1e-3, 64, 0.1


@dataclass(frozen=True)
class Run:
    """Accuracies on the test set, which training never sees; `before` is after calibration."""

    seed: int
    bits: int
    method: str
    init: str
    epochs: int
    baseline: float
    before: float
    after: float
    training_s: float
    machine: dict[str, Any]

    @property
    def drop(self) -> float:
        """The accuracy lost against FP32."""
        return self.baseline - self.after

    @property
    def passes(self) -> bool:
        """Whether that is allowed."""
        return self.drop <= ALLOWED[self.bits]


def main() -> None:
    """Train what the arguments ask for, keep the raw lines and print a table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    print("| bits | method | init | seed | FP32 | before | after | drop | passes | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for seed, bits, method, init in _cases(arguments):
        run = measure(seed, bits, method, init, arguments.epochs)
        RAW.parent.mkdir(parents=True, exist_ok=True)
        with RAW.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        print(
            f"| W{bits}A{bits} | {method} | {init} | {seed} | {run.baseline:.4f} | "
            f"{run.before:.4f} | {run.after:.4f} | {run.drop:.2%} | {run.passes} | "
            f"{run.training_s:.0f} |",
            flush=True,
        )


def measure(seed: int, bits: int, method: str, init: str, epochs: int) -> Run:
    """Train one model, and evaluate it before and after."""
    surroundings = machine.describe()
    task = digits_resnet.RECIPE.task(seed=seed)
    model = prepare_qat(
        task.model,
        calib_dataloader=task.calib_dataloader,
        inputs=TensorScheme(format=f"uint{bits}", symmetric=False, calibration="mse"),
        weights=TensorScheme(format=f"int{bits}", granularity=PerChannel(0), calibration="mse"),
        method=method,  # type: ignore[arg-type]
        init=init,  # type: ignore[arg-type]
    )
    model.eval()
    before = task.eval_func(model.model)
    started_s = time.perf_counter()
    fit_qat(model, (_loader(seed), _loss), epochs, lr=LEARNING_RATE, progress=False)
    training_s = time.perf_counter() - started_s
    after = task.eval_func(model.to_quantized().model)
    baseline = task.eval_func(task.model)
    return Run(seed, bits, method, init, epochs, baseline, before, after, training_s, surroundings)


def _loader(seed: int) -> DataLoader[Any]:
    data = digits()
    generator = torch.Generator().manual_seed(seed)
    pairs = TensorDataset(data.train_images, data.train_labels)
    return DataLoader(pairs, batch_size=BATCH, shuffle=True, generator=generator)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[int, int, str, str]]:
    for bits in arguments.bits:
        for method in arguments.methods:
            for init in ("lsq", "calibrated") if method != "qat" else ("calibrated",):
                for seed in arguments.seeds:
                    yield seed, bits, method, init


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--bits", nargs="+", type=int, choices=ALLOWED, default=list(ALLOWED))
    parser.add_argument("--methods", nargs="+", default=["lsq"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
