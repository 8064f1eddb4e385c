"""Softmax models of transformers as hybrids of ours: the same function where nothing is replaced, refusals by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config

from hybridattn.models.linearize import from_softmax, swap

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases and tied": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "llama, scaled positions": LlamaConfig(**SIZES, rope_parameters=LLAMA3, head_dim=16, rms_norm_eps=1e-4),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "mistral, full": MistralConfig(**SIZES, sliding_window=None, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, rms_norm_eps=1e-3, attention_bias=True),
    "qwen3, window": Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2, tie_word_embeddings=True
    ),
}


def saved(config: Any, folder: Path) -> PreTrainedModel:
    """A model of these sizes, all of its weights drawn anew so that norms and biases say something, in a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_nothing_replaced_is_the_teacher(name: str, tmp_path: Path):
    teacher = saved(CONFIGS[name], tmp_path)
    ours = from_softmax(tmp_path).eval()
    ids = torch.randint(50, (2, 40))
    expected = teacher(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(swap(ours, "1 full")(ids).logits, ours(ids).logits, rtol=0, atol=0)
