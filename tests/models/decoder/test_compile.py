"""The decoder under torch.compile and with a static cache: one graph, and one compilation of a decoding step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.models.decoder.cache import allocated_bytes, mixer_caches
from hybridattn.models.decoder.mixers import MIXERS
from hybridattn.models.decoder.sizes import cache_bytes

VOCAB, TOKENS, CAPACITY = 40, 9, 24


HEADS = {"num_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "gla": {**HEADS, "conv_size": 3, "gate_min": -0.1},
    "window": {**HEADS, "window": 5},
    "full": {"num_heads": 4, "num_key_value_heads": 2},
    "linear": {**HEADS, "key_dim": 4},
    "taylor": {**HEADS, "key_dim": 4},
    "prefix": {**HEADS, "key_dim": 4},
    "retention": HEADS,
    "lightning": HEADS,
    "delta": HEADS,
    "gated_delta": {**HEADS, "key_dim": 4},
    "kda": HEADS,
    "mamba2": {"head_dim": 8, "state_size": 4},
}
# Tracing takes a second for each layer. tests/layers/test_mixers.py compiles every mixer alone; families add no code.
STACKS: dict[str, dict[str, Any]] = {
    "every mixer": {"mixers": [*MIXERS]},
    "input convolutions": {"mixers": ["gla", "full"], "input_conv_size": 3},
}


def build(name: str) -> HybridAttnForCausalLM:
    torch.compiler.reset()
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "initializer": "fan_in"}
    # fp64, so that any error of a layer exceeds rounding errors.
    return HybridAttnForCausalLM(HybridAttnConfig(**sizes, mixer_options=OPTIONS, **STACKS[name])).double().eval()


@pytest.fixture(params=STACKS)
def model(request: pytest.FixtureRequest) -> HybridAttnForCausalLM:
    return build(request.param)


def tokens(length: int = TOKENS, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length))


def compiled(model: HybridAttnForCausalLM, counts: list[Any] | None = None) -> Callable[..., Any]:
    """Return the model's forward compiled as one graph; every compilation appends to ``counts``."""

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "name"), [("every mixer", "padded"), ("input convolutions", "plain"), ("input convolutions", "packed")]
)
def test_forward_and_backward_are_one_graph(stack: str, name: str):
    model, inputs, results = build(stack), INPUTS[name](), []
    if "prefix" in model.config.mixers:
        inputs["prefix_lengths"] = torch.tensor([3, 1])
    for run in (model, compiled(model)):
        out = run(**inputs, labels=inputs["input_ids"], use_cache=False)
        results.append([out.logits.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.slow
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
            torch.testing.assert_close(
                step(new, past_key_values=cache).logits, expected, rtol=1e-5, atol=1e-6
            )  # states are fp32
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
    options |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **options)
    for _ in range(2):  # the second call may reuse the first one's compiled step
        static = model.generate(ids, cache_implementation="static", **options)
        assert torch.equal(static.sequences, expected.sequences)
        torch.testing.assert_close(static.logits, expected.logits, rtol=1e-5, atol=1e-6)  # states are fp32


@torch.no_grad()
def test_a_static_cache_can_be_used_again(model: HybridAttnForCausalLM):
    cache, ids = StaticCache(config=model.config, max_cache_len=CAPACITY), tokens()
    first = model(ids, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, first)
