"""Mamba-2 checkpoints of transformers, converted: the logits are those of transformers' own model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from hybridattn.models.convert import convert

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "num_hidden_layers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"n_groups": 1},
    "groups": {"n_groups": 2, "layer_norm_epsilon": 0.5, "rescale_prenorm_residual": True, "residual_in_fp32": False},
    "tied": {"n_groups": 4, "tie_word_embeddings": True, "conv_kernel": 3, "expand": 4, "num_heads": 8},
    "biases": {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "time_step_limit": [0.3, 0.9]},
    "half a limit": {"n_groups": 2, "time_step_limit": [0.5, float("inf")], "chunk_size": 8},
}


def theirs(folder: Path, options: dict[str, Any]) -> Mamba2ForCausalLM:
    """Write a checkpoint with random weights and return its model."""
    model = Mamba2ForCausalLM(Mamba2Config(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path):
    source, ids = theirs(tmp_path / "source", VARIANTS[name]), torch.randint(0, 40, (2, 25))
    if VARIANTS[name]["n_groups"] > 1 and not hasattr(source.backbone.layers[0].mixer.norm, "group_size"):
        pytest.skip("this version of transformers has no groups in its norm, unlike the paper's code")
    expected = source(ids).logits
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    model = convert(tmp_path / "source", tmp_path / "target")
    assert model.config.mixers == ["mamba2", "mamba2"]
    assert (tmp_path / "target" / "tokenizer.json").exists()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    cache = loaded(ids[:, :20], use_cache=True).past_key_values
    steps = [loaded(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 25)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 20:], rtol=1e-4, atol=1e-4)


def test_files_that_ask_for_something_else(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    theirs(source, VARIANTS["plain"])
    fields, weights = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    changes: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
        ({"hidden_act": "gelu"}, {}, "hidden_act: expected 'silu' in a Mamba-2 model, got 'gelu'"),
        ({"rms_norm": False}, {}, "rms_norm: expected True"),
        ({"dt_limit": [0, 1]}, {}, "dt_limit: expected fields of transformers' Mamba2Config"),
        ({"num_heads": 5}, {}, "source: expected fields of a Mamba-2 model"),
        ({"state_size": 5}, {}, r"conv\.weight \[40, 1, 4\] for \[42, 1, 4\]"),
        ({}, {"backbone.layers.0.mixer.surplus": torch.ones(1)}, "unknown: model.layers.0.mixer.surplus"),
        ({"tie_word_embeddings": True}, {}, "lm_head.weight: expected the embeddings"),
    ]
    for number, (changed, added, named) in enumerate(changes):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**fields, **changed}))
        save_file({**weights, **added}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=named):
            convert(folder, target)
        assert not target.exists()
