"""Times an artifact beside the ordinary way to ONNX Runtime: FP32, as torch.onnx.export writes it.

Our own FP32 counterpart gets masks without denormal numbers and the like, too: that shows what
quantization alone gives. This shows what a user gets who has a plain export today.
"""

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuner.example import Example
from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.openvino_runtime import OpenVinoSession
from tuner.exporters.timing import interleaved

_SESSIONS = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}


def ordinary_latency(
    model: nn.Module, batch: Any, artifact: Path, target: str, sizes: Iterable[int]
) -> list[dict[str, float]]:
    """Return a line for each batch size: the median ms of the plain export and of the artifact."""
    if target not in _SESSIONS:
        return []
    example = Example.of_batch(model.eval(), batch)
    plain = OnnxRuntimeSession(_exported(model, example, artifact.with_name("ordinary.onnx")))
    return list(_timed(plain, _SESSIONS[target](artifact), example, sizes))


def _timed(
    plain: OnnxRuntimeSession, quantized: Any, example: Example, sizes: Iterable[int]
) -> Iterator[dict[str, float]]:
    for size in sizes:
        given = example.with_batch(size).tensors
        times = interleaved(
            {"plain": partial(plain.run, given), "quantized": partial(quantized.run, given)}
        )
        yield {
            "batch": size,
            "plain_ms": times["plain"].median_ms,
            "quantized_ms": times["quantized"].median_ms,
        }


def _exported(model: nn.Module, example: Example, path: Path) -> Path:
    args, kwargs = example.call(example.tensors)
    axis = {0: torch.export.Dim("batch", min=1, max=64)}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamic_shapes=dict.fromkeys(kwargs, axis) if kwargs else (axis,) * len(args),
            input_names=list(example.names),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    return path
