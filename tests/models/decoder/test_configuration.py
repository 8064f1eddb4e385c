"""The configuration: options of single layers, checks at construction, and numbers of layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridattn import (
    HybridAttnBasedConfig,
    HybridAttnConfig,
    HybridAttnForCausalLM,
    HybridAttnGLAConfig,
    HybridAttnJRTConfig,
)
from hybridattn.models.decoder.sizes import cache_bytes

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "pad_token_id": 0}
TWO_WINDOWS: dict[str, Any] = {
    **SIZES,
    "mixers": "1 near : 1 gla : 1 far",
    "mixer_aliases": {"near": {"mixer": "window", "window": 3}, "far": {"mixer": "window", "window": 9}},
    "mixer_options": {"window": {"num_heads": 2}, "gla": {"num_heads": 2}},
}


def test_two_windows_train_generate_and_count_their_bytes(tmp_path: Path):
    torch.manual_seed(0)
    config = HybridAttnConfig(**TWO_WINDOWS)
    model = HybridAttnForCausalLM(config)
    assert [getattr(layer.mixer, "window", None) for layer in model.model.layers] == [3, None, 9]
    ids = torch.randint(1, 40, (2, 14))
    model(ids, labels=ids).loss.backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in model.parameters())

    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        loaded.config.mixers
        == config.mixers
        == [
            {"mixer": "window", "window": 3},
            "gla",
            {"mixer": "window", "window": 9},
        ]
    )
    assert "mixer_aliases" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    tokens = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    without_cache = loaded.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(tokens, without_cache)

    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = (torch.arange(17) >= 3).long().expand(2, 17)
    for form in ({}, {"cache_implementation": "static"}):
        more = loaded.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, **form)
        assert torch.equal(more[:, 3:], tokens)

    cache = loaded(ids, use_cache=True).past_key_values
    kept = sum(x.nbytes for layer in cache.layers for x in layer.tensors.values())
    assert kept == cache_bytes(config, batch_size=2, tokens=14, dtype=torch.float32)


def test_a_number_of_layers_is_enough():
    assert HybridAttnConfig(num_hidden_layers=3).mixers == ["gla"] * 3
    assert HybridAttnConfig(mixers="1 full : 2 gla", num_hidden_layers=4).mixers == ["full", "gla", "gla", "full"]
    assert HybridAttnGLAConfig(num_hidden_layers=2).mixers == ["gla"] * 2
    for family, name in ((HybridAttnBasedConfig, "taylor"), (HybridAttnJRTConfig, "prefix")):
        assert family(num_hidden_layers=8).mixers == ["conv", name, "window", *["conv"] * 3, name, "window"]
        assert family(num_hidden_layers=2).mixers == ["conv", "conv"]
        published = [i for i, mixer in enumerate(family().mixers) if mixer == name]
        assert (len(family().mixers), published) == (27, [1, 6, 11, 16, 21])


def test_a_saved_configuration_agrees_with_itself(tmp_path: Path):
    config = HybridAttnConfig(**TWO_WINDOWS)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_hidden_layers: expected 3 \(one per mixer\), got 5"):
        HybridAttnConfig.from_pretrained(tmp_path, num_hidden_layers=5)
    again = HybridAttnConfig.from_pretrained(tmp_path, mixers="1 full", num_hidden_layers=5, backend="torch")
    assert (again.mixers, again.num_hidden_layers, again.backend) == (["full"] * 5, 5, "torch")
    with pytest.raises(ValueError, match=r"mixer_optons: expected a field .* 'mixer_options'"):
        HybridAttnConfig.from_pretrained(tmp_path, mixer_optons={})
    config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"num_hidden_layers: expected 3 \(one per mixer\), got 5"):
        config.save_pretrained(tmp_path)


def test_unknown_fields_of_a_file_are_kept_with_a_warning(tmp_path: Path):
    HybridAttnConfig(**SIZES).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mixer": ["full"], "num_labels": 3}))
    with pytest.warns(UserWarning, match=r"configuration: expected fields of HybridAttnConfig, got \['mixer'\]"):
        config = HybridAttnConfig.from_pretrained(tmp_path)
    assert (config.mixer, config.num_labels) == (["full"], 3)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": (
        {"mixer": ["gla"]},
        "mixer: expected a field .* unknown name; did you mean 'mixers'",
    ),
    "field of others": ({"rope_theta": 5e5}, "rope_theta: expected a field of HybridAttnConfig, got an unknown name$"),
    "mixer": ({"mixers": ["gla", "mamba3"]}, r"mixers\[1\]: expected one of \['conv', .*got 'mamba3'"),
    "defaults of no mixer": ({"mixer_options": {"x": {}}}, r"mixer_options\['x'\]: mixer: expected one of \["),
    "option": (
        {"mixers": ["gla", {"mixer": "window", "windows": 3}]},
        r"mixers\[1\] \('window'\): windows: expected one of \['alibi', .*got an unknown option",
    ),
    "option of layers that are not there": (
        {"mixer_options": {"window": {"window": 0}}},
        r"mixer_options\['window'\]: window: expected a positive integer, got 0",
    ),
    "type": (
        {"mixer_options": {"gla": {"num_heads": "two"}}},
        r"mixers\[0\] \('gla'\): num_heads: expected int, got 'two'",
    ),
    "flag": ({"mixers": [{"mixer": "full", "alibi": "no"}]}, "alibi: expected bool, got 'no'"),
    "heads": (
        {"mixer_options": {"gla": {"num_heads": 3}}},
        r"mixers\[0\] \('gla'\): num_heads: expected a divisor of hidden_size / 2 = 8, got 3",
    ),
    "range": (
        {"mixers": [{"mixer": "gla", "gate_bias_range": [6.0, 4.0]}]},
        "gate_bias_range: expected two numbers",
    ),
    "backend of a mixer": ({"mixers": [{"mixer": "gla", "backend": "cuda"}]}, "backend: expected one of"),
    "epsilon of a mixer": ({"mixers": [{"mixer": "gla", "norm_eps": -1.0}]}, "norm_eps: expected a positive number"),
    "epsilon": ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number, got -1.0"),
    "alias that no layer has": (
        {"mixer_aliases": {"far": {"mixer": "window", "windows": 3}}},
        r"mixer_aliases\['far'\]: windows: expected one of",
    ),
    "alias": (
        {"mixers": ["fra"], "mixer_aliases": {"far": {"mixer": "window", "window": 3}}},
        r"mixers\[0\]: expected one of \[.*'far'\], got 'fra'",
    ),
    "field of generation": ({"temperature": 4.0}, "temperature: .* set it in model.generation_config"),
    "shadowed": ({"mixer_aliases": {"gla": "full"}}, r"mixer_aliases: expected names .* got \['gla'\]"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive number, got 0"),
    "convolution": ({"input_conv_size": 0}, "input_conv_size: expected a positive number or None, got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_construction_names_wrong_fields(name: str):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        HybridAttnConfig(**{**SIZES, **changes})


def test_integers_are_valid_as_floats():
    options = {"gla": {"gate_bias_range": [4, 6], "rope_theta": 10000}}
    assert HybridAttnConfig(**SIZES, mixer_options=options).mixer_options == options
