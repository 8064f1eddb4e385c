"""Scaling of rotary frequencies against transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridattn.layers.rotary import apply_rotary, rotary_frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
RULES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "llama3, short context": {
        "rope_type": "llama3",
        "factor": 32.0,
        **LLAMA3,
        "original_max_position_embeddings": 100,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "yarn, other ramp": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
    },
    "yarn, a ramp beyond the last frequency": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 131072,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "yarn, a step for a ramp": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 4.0,
        "beta_slow": 4.0,
        "truncate": False,
    },
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("name", RULES)
def test_frequencies_equal_those_of_transformers(name: str, dim: int, theta: float):
    rule = RULES[name]
    config = LlamaConfig(
        head_dim=dim,
        max_position_embeddings=131072,
        rope_parameters={**rule, "rope_theta": theta},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[rule["rope_type"]](config, torch.device("cpu"))
    frequencies, factor = rotary_frequencies(dim, theta, rule)
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    assert not torch.allclose(frequencies, rotary_frequencies(dim, theta)[0])


def test_the_attention_factor_scales_the_rotated_heads():
    x, positions = torch.randn(1, 5, 2, 8), torch.arange(5)[None]
    plain = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    one, twice = (apply_rotary(x, positions, 1e4, {**plain, "attention_factor": f}) for f in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * one)
    torch.testing.assert_close(one.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"factor": 2.0}, r"expected a dict with a rope_type of \['linear', 'llama3', 'yarn'\], got None"),
        ({"rope_type": "longrope"}, "expected a dict with a rope_type of .*, got 'longrope'"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_scaling: .* of type 'llama3', got .*missing 3 required"),
        ({"rope_type": "linear", "factor": 8.0, "beta": 1}, "type 'linear', got .*unexpected keyword argument 'beta'"),
    ],
)
def test_errors_name_unsupported_scalings(rule: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        rotary_frequencies(8, 1e4, rule)


@pytest.mark.parametrize(
    ("theta", "scaling", "message"),
    [
        (0.0, None, "rope_theta: expected more than 1, got 0.0"),
        (1.0, {"rope_type": "yarn"}, "rope_theta: expected more than 1, got 1.0"),
        (10.0, "linear", "rope_scaling: expected a dict with a rope_type of .*, got 'linear'"),
        (10.0, {"rope_type": "linear", "factor": 0.0}, "rope_scaling: expected a positive factor, got 0.0"),
    ],
)
def test_errors_name_bad_thetas_and_factors(theta: float, scaling: Any, message: str):
    with pytest.raises(ValueError, match=message):
        rotary_frequencies(8, theta, scaling)
