"""FP32 and bfloat16 in PyTorch, compiled as a package is: the baselines to beat."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tuner.exporters.agreement import Run
from tuner.exporters.torch_graph import float_graph
from tuner.exporters.torch_package import compile_package, load_package
from tuner.exporters.tracing import Traced

_BASELINES = {"FP32 compiled": False, "BF16 compiled": True}


def compiled_baselines(traced: Traced) -> dict[str, Run]:
    """Compile the model in FP32 and in bfloat16; raises ExportError where that fails."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, bf16 in _BASELINES.items():
            path = Path(folder) / f"{name.replace(' ', '-')}.pt2"
            compile_package(traced.exported(float_graph(traced, bf16)), path)
            found[name] = load_package(path)
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
