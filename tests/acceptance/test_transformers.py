"""Models of the transformers library, tiny and untrained, through fit, save and load."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import AccuracyGoal, TuningConfig, quantization

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(0, 120, (16, 12), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return transformers.BertModel(config).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **SMALL)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=True,
        **SMALL,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("build", [gpt2, llama])
def test_causal_language_models(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        labels = model(TOKENS).logits.argmax(-1)

    def eval_func(tuned: Any) -> torch.Tensor:
        assert isinstance(tuned, type(model))
        with torch.no_grad():
            tuned.generate(TOKENS[:1, :4], max_new_tokens=2, do_sample=False)
            return (tuned(TOKENS).logits.argmax(-1) == labels).float().mean(1)

    goal = AccuracyGoal(max_drop=0.1)
    config = TuningConfig(space="mixed-int", goal=goal, max_trials=6)
    tuned = quantization.fit(model, [{"input_ids": TOKENS}], eval_func, config)
    result = tuned.result
    assert result.uncovered == {}
    assert result.unreached == ()
    assert result.quantized_ops == len(tuned.plan) > 8
    head = tuned.model.get_output_embeddings()
    assert head.weight is tuned.model.get_input_embeddings().weight
    tuned.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", build())
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, tuned(TOKENS).logits)


def test_bert_with_a_padding_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    mask = torch.ones_like(TOKENS)
    mask[:, 9:] = 0
    batch = transformers.BatchEncoding({"input_ids": TOKENS, "attention_mask": mask})
    with torch.no_grad():
        reference = model(**batch).last_hidden_state[:, :9]

    def eval_func(tuned: Any) -> torch.Tensor:
        with torch.no_grad():
            states = tuned(**batch).last_hidden_state[:, :9]
        return torch.cosine_similarity(states.flatten(1), reference.flatten(1)).mean()

    tuned = quantization.fit(model, [batch], eval_func)
    assert tuned.result.goal_met
    assert tuned.result.quantized_ops == len(tuned.plan) == 2 * 7 + 4
    tuned.save(tmp_path / "out")
    again = quantization.load(tmp_path / "out", bert())
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, tuned(**batch).last_hidden_state)
