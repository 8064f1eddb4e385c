"""The decoder under torch.compile and with a static cache: no graph breaks, and no step that is compiled twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.models.decoder.accounting import cache_bytes
from hybridattn.models.decoder.cache import allocated_bytes, mixer_caches
from hybridattn.models.decoder.mixers import MIXERS
from hybridattn.models.families import HybridAttnBasedConfig, HybridAttnGLAConfig, HybridAttnJRTConfig

VOCAB, TOKENS, CAPACITY = 40, 9, 24
OPTIONS = {
    "gla": {"num_heads": 2},
    "window": {"num_heads": 2, "window": 5},
    "full": {"num_heads": 4, "num_key_value_heads": 2},
    "linear": {"num_heads": 2, "key_dim": 4},
    "taylor": {"num_heads": 2, "key_dim": 4},
}
STACKS = {**{name: [name] for name in MIXERS}, "hybrid": ["conv", "gla", "window", "full", "linear"]}
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "initializer": "fan_in"}
FAMILIES: dict[str, Callable[[], HybridAttnConfig]] = {
    "gla family": lambda: HybridAttnGLAConfig(
        **SIZES, num_hidden_layers=2, num_heads=2, use_short_conv=True, clamp_min=-0.1, eos_token_id=None
    ),
    "based family": lambda: HybridAttnBasedConfig(**SIZES, mixers=["conv", "taylor", "window"], mixer_options=OPTIONS),
    "jrt family": lambda: HybridAttnJRTConfig(**SIZES, mixers=["conv", "prefix", "window"], mixer_options=OPTIONS),
}


@pytest.fixture(params=[*STACKS, *FAMILIES])
def model(request: pytest.FixtureRequest) -> HybridAttnForCausalLM:
    torch.compiler.reset()
    if request.param in FAMILIES:
        return AutoModelForCausalLM.from_config(FAMILIES[request.param]()).eval()
    config = HybridAttnConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        mixers=STACKS[request.param],
        mixer_options=OPTIONS if request.param != "hybrid" else {**OPTIONS, "gla": {"num_heads": 2, "conv_size": 3}},
        input_conv_size=3 if request.param == "hybrid" else None,
        initializer="fan_in",
    )
    return HybridAttnForCausalLM(config).eval()


def tokens(length: int = TOKENS, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length))


def compiled(model: HybridAttnForCausalLM, counts: list[Any] | None = None) -> Callable[..., Any]:
    """The model's forward as one graph; every compilation of it is added to ``counts``."""

    def backend(graph, inputs):
        if counts is None:
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        counts.append(graph)
        return graph.forward

    return torch.compile(model.forward, fullgraph=True, backend=backend)


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "plain": lambda: {"input_ids": tokens()},
    "padded": lambda: {
        "input_ids": tokens(),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1, 0]]),
    },
    "packed": lambda: {"input_ids": tokens(batch=1), "cu_seq_lens_q": torch.tensor([0, 4, 9])},
}


@pytest.mark.parametrize("name", INPUTS)
def test_forward_and_backward_are_one_graph(model: HybridAttnForCausalLM, name: str):
    inputs, results = INPUTS[name](), []
    if "prefix" in model.config.mixers:
        inputs["prefix_lengths"] = torch.tensor([3, 1])
    for run in (model, compiled(model)):
        out = run(**inputs, labels=inputs["input_ids"], use_cache=False)
        results.append([out.logits.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_step_with_a_static_cache_is_compiled_once(model: HybridAttnForCausalLM):
    counts: list[Any] = []
    step = compiled(model, counts)
    ids, mask = tokens(), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        model(ids, past_key_values=cache, **options)
        growing = model(ids, use_cache=True, **options).past_key_values
        for _ in range(CAPACITY - TOKENS):
            new = tokens(1)
            expected = model(new, past_key_values=growing).logits
            torch.testing.assert_close(step(new, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(counts) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_cache_is_allocated_once(model: HybridAttnForCausalLM, dtype: torch.dtype):
    model.to(dtype)
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    model(tokens(), past_key_values=cache)
    places = [x.data_ptr() for layer in mixer_caches(cache) for x in layer.tensors.values()]
    for _ in range(CAPACITY - TOKENS):
        model(tokens(1), past_key_values=cache)
    assert [x.data_ptr() for layer in mixer_caches(cache) for x in layer.tensors.values()] == places
    assert allocated_bytes(cache) == cache_bytes(model.config, batch_size=2, tokens=CAPACITY, dtype=dtype)
    assert cache.get_seq_length() == CAPACITY


def test_more_tokens_than_a_static_cache_holds():
    model = HybridAttnForCausalLM(HybridAttnConfig(vocab_size=VOCAB, hidden_size=16, mixers=["full"])).eval()
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    with torch.no_grad(), pytest.raises(ValueError, match="cache: expected at most 24 tokens per sequence, got 25"):
        model(tokens(CAPACITY + 1), past_key_values=cache)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_with_a_static_cache(model: HybridAttnForCausalLM, beams: int, padded: bool):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 1 - int(padded)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": VOCAB, "pad_token_id": 0, "num_beams": beams}
    expected = model.generate(ids, attention_mask=mask, **options)
    for _ in range(2):  # a second call may use what the first has left
        static = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
        assert torch.equal(static, expected)


@torch.no_grad()
def test_a_static_cache_can_be_used_again(model: HybridAttnForCausalLM):
    cache, ids = StaticCache(config=model.config, max_cache_len=CAPACITY), tokens()
    first = model(ids, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, first)
