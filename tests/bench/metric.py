"""Whether an artifact's metric is the simulation's, on so many queries that chance evens out.

MiniLM amplifies the last bit of a sum to a percent at its outputs, and a search over 800 documents
moves by a percent with it. Here mixed plans are tuned on few queries, exported, and judged on all
docstrings of the standard library and the packages that are installed for the bench, in searches of
800 documents each: by recall@10, the mean of 1 ÷ rank, and the area under the ROC curve. What is
left to chance is the standard error of the mean difference of a query's values.
"""

import argparse
import math
import os
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import machine
import tables
import torch
from torch import Tensor, nn

from tuner import TuningConfig, quantization, recipes
from tuner.batches import read_batches
from tuner.recipes.docstring_pairs import STANDARD_LIBRARY, docstring_pairs
from tuner.recipes.minilm import embeddings, pretrained, token_batches

_PACKAGES = ("torch", "numpy", "scipy", "sklearn")
_DOCUMENTS = 800
_TOKENS = 64
_TOP = 10


@dataclass(frozen=True, eq=False)
class Searches:
    """Queries and documents of several searches, each as batches of tokens."""

    parts: list[tuple[list[Any], list[Any]]]

    @classmethod
    def of_docstrings(cls, count: int) -> "Searches":
        """Read the docstrings; make as many searches of them as there are, at most `count`."""
        _, tokenizer = pretrained()
        site = Path(sysconfig.get_path("purelib"))
        pairs = docstring_pairs(STANDARD_LIBRARY, *(site / name for name in _PACKAGES))
        parts = []
        for start in range(0, min(len(pairs) // _DOCUMENTS, count) * _DOCUMENTS, _DOCUMENTS):
            part = pairs[start : start + _DOCUMENTS]
            queries = token_batches(tokenizer, [pair.query for pair in part], _TOKENS)
            documents = token_batches(tokenizer, [pair.document for pair in part], _TOKENS)
            parts.append((queries, documents))
        return cls(parts)

    def ranks(self, model: nn.Module) -> Tensor:
        """Return the rank of each query's own document, from 0."""
        return torch.cat([_ranks(model, *part) for part in self.parts])


def _ranks(model: nn.Module, queries: list[Any], documents: list[Any]) -> Tensor:
    similarity = embeddings(model, queries) @ embeddings(model, documents).T
    return (similarity > similarity.diagonal().unsqueeze(1)).sum(1)


def _values(ranks: Tensor) -> dict[str, Tensor]:
    """Return what each query counts for in the metrics, which are the means."""
    return {
        f"recall@{_TOP}": (ranks < _TOP).double(),
        "mean of 1 ÷ rank": 1 / (ranks + 1).double(),
        "ROC AUC": 1 - ranks.double() / (_DOCUMENTS - 1),
    }


def _metrics(ranks: Tensor) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in _values(ranks).items()}


def _errors(found: Tensor, other: Tensor) -> dict[str, float]:
    """Return the standard errors of the differences of metrics, of two rankings of the same."""
    one, two = _values(found), _values(other)
    return {name: float((one[name] - two[name]).std() / math.sqrt(len(found))) for name in one}


def row(target: str, searches: Searches, pairs: int, trials: int) -> dict[str, Any]:
    """Return the raw line of one target: metrics of the simulation and of the artifact."""
    task = recipes.get("minilm-retrieval").task(pairs=pairs)
    config = TuningConfig(space="mixed-int", target=target, max_trials=trials)
    model = quantization.fit(task.model, task.calib_dataloader, task.eval_func, config)
    ranks: list[Tensor] = []

    def judged(found: nn.Module) -> float:
        ranks.append(searches.ranks(found))  # of the artifact, then of the simulation
        return 0.0

    example = next(iter(read_batches(task.calib_dataloader, None)))
    with tempfile.TemporaryDirectory() as folder:
        model.export(
            Path(folder), target=target, example_inputs=example, eval_func=judged, batches=()
        )
    artifact, simulation = ranks
    apart = (artifact != simulation).float().mean()
    return {
        "model": "minilm",
        "target": target,
        "queries": len(artifact),
        "quantized_ops": model.result.quantized_ops,
        "other_ranks": float(apart),
        "artifact": _metrics(artifact),
        "simulation": _metrics(simulation),
        "standard_error": _errors(artifact, simulation),
        "machine": machine.describe(),
    }


def main() -> None:
    """Measure what the arguments ask for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["onnxruntime", "openvino", "torch"])
    parser.add_argument("--searches", type=int, default=10, help="of 800 documents, at most")
    parser.add_argument("--pairs", type=int, default=200, help="that the plan is tuned on")
    parser.add_argument("--trials", type=int, default=8, help="at most, for each tuning")
    arguments = parser.parse_args()
    searches = Searches.of_docstrings(arguments.searches)
    in_float = {"FP32": _metrics(searches.ranks(pretrained()[0]))}
    print(in_float, flush=True)
    for target in arguments.targets:
        started = time.perf_counter()
        measured = {**row(target, searches, arguments.pairs, arguments.trials), **in_float}
        tables.append(measured, tables.METRIC)
        print(target, measured["simulation"], measured["artifact"], flush=True)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    tables.render()


if __name__ == "__main__":
    main()
