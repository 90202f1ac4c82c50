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
from torch import Tensor, nn

from tuner.exporters.onnx_runtime import OnnxRuntimeSession
from tuner.exporters.openvino_runtime import OpenVinoSession
from tuner.exporters.timing import interleaved

_SESSIONS = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}


def ordinary_latency(
    model: nn.Module, example: Any, artifact: Path, target: str, batches: Iterable[int]
) -> list[dict[str, float]]:
    """Return a line for each batch size: the median ms of the plain export and of the artifact."""
    if target not in _SESSIONS:
        return []
    plain = OnnxRuntimeSession(_exported(model, example, artifact.with_name("ordinary.onnx")))
    quantized = _SESSIONS[target](artifact)
    names, tensors = _named(example)
    return list(_timed(plain, quantized, dict(zip(names, tensors, strict=True)), batches))


def _timed(
    plain: OnnxRuntimeSession, quantized: Any, inputs: dict[str, Tensor], batches: Iterable[int]
) -> Iterator[dict[str, float]]:
    for batch in batches:
        given = [tensor[:batch] for tensor in inputs.values()]
        times = interleaved(
            {"plain": partial(plain.run, given), "quantized": partial(quantized.run, given)}
        )
        yield {
            "batch": batch,
            "plain_ms": times["plain"].median_ms,
            "quantized_ms": times["quantized"].median_ms,
        }


def _exported(model: nn.Module, example: Any, path: Path) -> Path:
    names, tensors = _named(example)
    axis = {0: torch.export.Dim("batch", min=1, max=64)}
    as_keywords = isinstance(example, dict)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            () if as_keywords else tuple(tensors),
            kwargs=example if as_keywords else None,
            dynamic_shapes=dict.fromkeys(names, axis) if as_keywords else (axis,) * len(tensors),
            input_names=names,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    return path


def _named(example: Any) -> tuple[list[str], list[Tensor]]:
    """Return the inputs with their names; unnamed ones are counted."""
    if isinstance(example, dict):
        return list(example), list(example.values())
    tensors = [example] if isinstance(example, Tensor) else list(example)
    return [f"input_{index}" for index in range(len(tensors))], tensors
