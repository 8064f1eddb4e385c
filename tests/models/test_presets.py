"""Numbers of parameters and state sizes of the presets against published numbers."""

import pytest
import torch

from hybridattn import HybridAttnForCausalLM
from hybridattn.layers import BaseConv, SoftmaxAttention, TaylorLinearAttention
from hybridattn.models.decoder.sizes import cache_elements, cache_spec, parameters_of
from hybridattn.models.presets import PRESETS

PARAMETERS = {
    "gla_340m": 340e6,
    "gla_1b3": 1.3e9,
    "delta_net_1b3": 1.3e9,
    "gated_delta_net_1b3": 1.3e9,
    "kda_1b3": 1.32e9,  # not published: delta_net_1b3 and the gates of its layers
    "mamba2_130m": 130e6,
    "mamba2_370m": 370e6,
    "mamba2_780m": 780e6,
    "mamba2_2b7": 2.7e9,
    "based_360m": 360e6,
    "based_1b3": 1.35e9,
    "transformer_360m": 360e6,
    "transformer_1b3": 1.33e9,
    "retnet_340m": 340e6,
    "lightning_340m": 340e6,
    "head_gated_340m": 340e6,
    "hybrid_340m": 340e6,
}


def on_meta(name: str) -> HybridAttnForCausalLM:
    with torch.device("meta"):
        return HybridAttnForCausalLM(PRESETS[name]())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_within_one_percent(name: str):
    assert on_meta(name).num_parameters() == pytest.approx(PARAMETERS[name], rel=0.01)


def test_parameters_equal_those_of_the_released_delta_net():
    """fla-hub/delta_net-1.3B-100B, whose head is not tied."""
    assert sum(parameters_of(PRESETS["delta_net_1b3"](tie_word_embeddings=False))) == 1_365_677_056


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_of_equals_the_number_of_the_model(is_tied: bool):
    config = PRESETS["hybrid_340m"](tie_word_embeddings=is_tied, input_conv_size=4)
    with torch.device("meta"):
        model = HybridAttnForCausalLM(config)
    *layers, _ = counted = parameters_of(config)
    assert layers == [sum(x.numel() for x in layer.parameters()) for layer in model.model.layers]
    assert sum(counted) == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "d", "linear", "published"),
    [("based_360m", 1024, [1, 6, 11, 16, 21], 2.83e6), ("based_1b3", 1792, [1, 6, 11, 16, 21, 27, 33], 6.90e6)],
)
def test_state_of_based(name: str, d: int, linear: list[int], published: float):
    """The positions of the layers, and the published number of elements, which counts 273 features and 3 inputs."""
    kinds = {BaseConv: "conv", TaylorLinearAttention: "taylor", SoftmaxAttention: "window"}
    layers = [kinds[type(layer.mixer)] for layer in on_meta(name).model.layers]
    assert [i for i, kind in enumerate(layers) if kind == "taylor"] == linear
    assert [i for i, kind in enumerate(layers) if kind == "window"] == [i + 1 for i in linear]
    spec = cache_spec(PRESETS[name](), batch_size=1, tokens=2**15, dtype=torch.bfloat16)
    ours = {kind: {cache_elements(x) for x, k in zip(spec, layers, strict=True) if k == kind} for kind in set(layers)}
    heads, window = 16, 128
    assert ours == {
        "taylor": {heads * 153 * (d // heads + 1)},
        "window": {2 * window * d},
        "conv": {2 * 2 * d},
    }
    convs = len(layers) - 2 * len(linear)
    counted = len(linear) * (heads * 273 * (d // heads + 1) + 2 * window * d) + convs * 3 * 2 * d
    assert counted == pytest.approx(published, rel=0.005)
    assert sum(map(cache_elements, spec)) < 0.8 * counted


@pytest.mark.parametrize(("name", "published"), [("transformer_360m", 98e3), ("transformer_1b3", 242e3)])
def test_bytes_per_token_of_attention(name: str, published: float):
    """Bytes of keys and values per token in a 16-bit dtype."""
    per_token = [
        sum(cache_elements(x) for x in cache_spec(PRESETS[name](), batch_size=1, tokens=t, dtype=torch.bfloat16))
        for t in (100, 101)
    ]
    assert 2 * (per_token[1] - per_token[0]) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        *(("gla_340m", 1e-6), ("gla_1b3", 1e-6), ("based_360m", 1e-5), ("based_1b3", 1e-5), ("jrt_360m", 1e-5)),
        *(("delta_net_1b3", 1e-6), ("gated_delta_net_1b3", 1e-5), ("mamba2_130m", 1e-5)),
    ],
)
def test_norms_of_families(name: str, eps: float):
    assert on_meta(name).model.norm.eps == eps
