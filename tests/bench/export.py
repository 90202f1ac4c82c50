"""What exports give: size, agreement with the simulation, time beside FP32 in the same runtime.

Models are tuned for the target with a 1 % goal (`--space int8` by default). ResNet-18, MobileNetV2,
DistilGPT2 and Pythia-70M have random weights: in int8 and int4-weight-only they are quantized by
calibration alone, in other spaces their logits may be 2 % off FP32's. Language models are timed on
sequences of 128 tokens.
"""

import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import export_columns
import machine
import tables
import torch
from export_models import RANDOM, arguments_of, random_inputs
from models import MODELS
from ordinary import ordinary_latency
from torch import Tensor, nn

from tuner import AccuracyGoal, NothingQuantizedWarning, QuantizedModel, TuningConfig, quantization
from tuner.batches import read_batches
from tuner.evaluation import EvalFunc
from tuner.records import describe_config

_TRIALS = 12
_SEQUENCE = 128
_CALIBRATED = ("int8", "int4-weight-only")
_LOGITS_OFF = 0.02
_KEPT = (
    "size_bytes",
    "float_size_bytes",
    "agreement",
    "metric",
    "simulated_metric",
    "metric_floor",
)


def tuned(name: str, space: str, target: str, trials: int) -> tuple[QuantizedModel, Any, Any]:
    """Return a model tuned for a target, an example of its inputs, and its eval_func."""
    config = TuningConfig(space=space, target=target, max_trials=trials)
    if name in RANDOM:
        return _random(name, config)
    task = MODELS[name]()
    found = quantization.fit(task.model, task.calib_dataloader, task.eval_func, config)
    example = next(iter(read_batches(task.calib_dataloader, None)))
    if name == "minilm":
        example = {key: _as_long(value) for key, value in dict(example).items()}
    return found, example, task.eval_func


def _random(name: str, config: TuningConfig) -> tuple[QuantizedModel, Tensor, Any]:
    """Tune a model with random weights: by calibration alone, or for the logits of FP32."""
    model, inputs = RANDOM[name](), random_inputs(name, seed=0)
    loader = [inputs[:8], inputs[8:]]
    if config.space in _CALIBRATED:
        return quantization.fit(model, loader, config=config), inputs[:8], None
    eval_func = _nearness(model, random_inputs(name, seed=1)[:8])
    goal = AccuracyGoal(max_drop=_LOGITS_OFF)
    config = config.model_copy(update={"goal": goal})
    return quantization.fit(model, loader, eval_func, config), inputs[:8], eval_func


@torch.no_grad()
def _nearness(model: nn.Module, inputs: Tensor) -> EvalFunc:
    """Return an eval_func: 1 - |logits - FP32's| / |FP32's| on inputs that nothing else saw."""
    expected = model(inputs)

    @torch.no_grad()
    def eval_func(found: nn.Module) -> float:
        return 1 - float((found(inputs) - expected).norm() / expected.norm())

    return eval_func


def _as_long(tokens: Tensor) -> Tensor:
    """Repeat the tokens of 8 sequences to the length that is timed."""
    return tokens[:8].repeat(1, -(-_SEQUENCE // tokens.shape[1]))[:, :_SEQUENCE].contiguous()


def row(name: str, space: str, target: str, trials: int) -> dict[str, Any]:
    """Return the raw line of one export."""
    model, example, eval_func = tuned(name, space, target, trials)
    with tempfile.TemporaryDirectory() as folder:
        options = {"example_inputs": example, "eval_func": eval_func}
        report = model.export(Path(folder) / "model", target=target, **options)
        batches = [entry.batch for entry in report.latency]
        original = RANDOM[name]() if name in RANDOM else MODELS[name]().model
        plain = ordinary_latency(original, example, report.files[0], target, batches)
    found = report.to_dict()
    return {
        "model": name,
        "space": space,
        "target": target,
        "quantized_ops": model.result.quantized_ops,
        "ops": len(model.plan),
        "choices": Counter(map(describe_config, model.plan.values())),
        "simulated": model.result.best.accuracy,
        "float": model.result.baseline,
        **{key: found.get(key) for key in _KEPT},
        "layers": found["layers"],
        "latency": found["latency"],
        "plain_export": plain,
        "left_float": found["left_float"],
        "notes": list(report.notes),
        "machine": machine.describe(),
    }


def main() -> None:
    """Measure what the arguments ask for, and write the table."""
    arguments = arguments_of(__doc__, MODELS, _TRIALS)
    warnings.simplefilter("ignore", NothingQuantizedWarning)
    for name in arguments.models:
        for target in arguments.targets:
            measured = row(name, arguments.space, target, arguments.trials)
            tables.append(measured, tables.EXPORT)
            print(
                name,
                target,
                [export_columns.speedup(each) for each in measured["latency"]],
                flush=True,
            )
    tables.render()


if __name__ == "__main__":
    main()
