"""Linearising models of transformers: equal outputs without replaced mixers, weights of new mixers, errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config

from hybridattn.models.linearize import from_softmax, inherited, mixer_of, replaced_layers, swap

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
    "llama, a window that it does not read": LlamaConfig(**{**SIZES, "sliding_window": 5}),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "mistral, full": MistralConfig(**SIZES, sliding_window=None, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, rms_norm_eps=1e-3, attention_bias=True),
    "qwen3, window": Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2, tie_word_embeddings=True
    ),
}


def saved(config: Any, folder: Path) -> PreTrainedModel:
    """Save a model of these sizes with random weights, also of norms and biases, in a folder."""
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


@torch.no_grad()
def test_new_mixers_start_from_the_attention_they_replace(tmp_path: Path):
    saved(CONFIGS["llama"], tmp_path)
    teacher = from_softmax(tmp_path)
    student = swap(teacher, ["gla", "full", "window", "retention"], {"window": {"window": 3}})
    assert student.config.mixers == ["gla", "full", "window", "retention"]
    assert replaced_layers(student, teacher) == [0, 2, 3]
    old, new = teacher.state_dict(), student.state_dict()
    for name in set(old) & set(new):
        if (
            name.startswith(("model.layers.0.mixer.", "model.layers.3.mixer."))
            and name.split(".")[4] in "k_proj v_proj"
        ):
            repeated = torch.cat([half for half in old[name].chunk(2) for _ in range(2)])  # repeats two heads to four
            assert torch.equal(new[name], repeated)
        else:
            assert torch.equal(new[name], old[name]), name
    fresh = {name.split(".")[4] for name in set(new) - set(old)}
    assert fresh == {"g_proj", "gk_proj", "g_norm"}
    decay = mixer_of(student, 0).log_decay(torch.randn(1, 9, 32)).exp()
    assert 0.99 < decay.min() <= decay.max() < 1


@pytest.mark.parametrize("mixer", ["delta", "gated_delta", "kda"])
def test_delta_rules_start_from_the_attention_they_replace(mixer: str, tmp_path: Path):
    saved(CONFIGS["llama"], tmp_path)
    teacher = from_softmax(tmp_path)
    student = swap(teacher, f"1 full : 3 {mixer}")
    taken = inherited(student, teacher)
    assert {name.split(".")[4] for name in taken if ".1.mixer." in name} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    ids = torch.randint(50, (1, 20))
    student(ids, labels=ids).loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in student.parameters())


def test_weights_of_another_head_size_are_not_copied(tmp_path: Path):
    """Key weights of 4 heads of 4 have as many rows as the teacher's 2 heads of 8, and must not be copied."""
    saved(CONFIGS["llama"], tmp_path)
    teacher = from_softmax(tmp_path)
    taken = inherited(swap(teacher, "1 full : 1 linear", {"linear": {"key_dim": 4}}), teacher)
    assert {name.split(".")[4] for name in taken if ".1.mixer." in name} == {"v_proj", "o_proj"}
    taken = inherited(swap(teacher, "1 full : 1 window", {"window": {"num_key_value_heads": 1}}), teacher)
    assert {name.split(".")[4] for name in taken if ".1.mixer." in name} == {"q_proj", "o_proj"}


@torch.no_grad()
def test_norms_of_queries_are_left_out_where_there_are_none(tmp_path: Path):
    saved(Qwen3Config(**SIZES, head_dim=8), tmp_path)
    student = swap(from_softmax(tmp_path), "1 full : 1 gla")
    assert student(torch.randint(50, (1, 9))).logits.isfinite().all()
    assert "model.layers.0.mixer.q_norm.weight" in student.state_dict()
    assert "model.layers.1.mixer.q_norm.weight" not in student.state_dict()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
        ({"mlp_bias": True}, "mlp_bias: expected False"),
        ({"attention_dropout": 0.1}, "attention_dropout: expected 0.0"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "got 'dynamic'"),
        ({"model_type": "gemma"}, "got 'gemma'"),
        ({"intermediate_size": 64}, "model.layers.0.mlp.down_proj.weight [32, 48] for [32, 64]"),
        ({"num_hidden_layers": 3}, "unknown: model.layers.3"),
        ({"num_hidden_layers": 5}, "missing: model.layers.4"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path):
    saved(CONFIGS["llama"], tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(named)):
        from_softmax(tmp_path)


def test_new_windows_stand_beside_kept_ones(tmp_path: Path):
    saved(CONFIGS["mistral"], tmp_path)
    teacher = from_softmax(tmp_path)
    assert replaced_layers(swap(teacher, "1 window", {"window": {"window": 2}}), teacher) == [0, 1, 2, 3]
    assert replaced_layers(swap(teacher, "1 full : 1 window"), teacher) == []
    student = swap(teacher, "1 full : 1 window", {"window": {"window": 2}})
    own = mixer_of(teacher, 0).window
    assert [mixer_of(student, layer).window for layer in range(4)] == [own, 2, own, 2]
    student = swap(teacher, ["full", "gla", {"mixer": "window", "window": 3}, "full"])
    assert (replaced_layers(student, teacher), mixer_of(student, 2).window) == ([1, 2], 3)


@pytest.mark.parametrize(
    ("mixers", "options", "named"),
    [
        (["full", "gla"], None, "mixers: expected one for each of the 4 layers, got 2"),
        ("1 full : 1 mamba", None, "got 'mamba'"),
        ("1 full : 1 gla", {"window": {}}, "mixer_options: expected mixers of ['gla'], the new layers, got ['window']"),
        ("1 full : 1 gla", {"gla": {"gates": 3}}, "mixers[1] ('gla'): gates: expected one of"),
        ("1 full : 1 gla", {"full": {"rope_theta": 5.0}}, "['gla'], the new layers, got ['full']"),
    ],
)
def test_bad_patterns_are_named(mixers: Any, options: Any, named: str, tmp_path: Path):
    saved(CONFIGS["llama"], tmp_path)
    with pytest.raises(ValueError, match=re.escape(named)):
        swap(from_softmax(tmp_path), mixers, options)


def test_biases_have_no_place_in_a_linear_mixer(tmp_path: Path):
    saved(CONFIGS["llama, biases and tied"], tmp_path)
    with pytest.raises(ValueError, match="attention_bias: expected False where layers become"):
        swap(from_softmax(tmp_path), "1 full : 1 gla")
