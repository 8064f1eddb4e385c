from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hybridattn import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.evals.lm_eval import parity

GATES = {"cached = uncached", "padded = unpadded", "prefill + decode = forward"}


def hybrid() -> HybridAttnForCausalLM:
    options = {name: {"num_heads": 2} for name in ("gla", "window", "taylor", "full")} | {
        "window": {"num_heads": 2, "window": 16},
        "taylor": {"num_heads": 2, "key_dim": 4},
    }
    config = HybridAttnConfig(
        vocab_size=64,
        hidden_size=32,
        mixers=["conv", "gla", "window", "taylor", "full"],
        mixer_options=options,
        initializer="fan_in",
        pad_token_id=0,
        eos_token_id=1,
    )
    return HybridAttnForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "hybrid": hybrid,
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=1,
        )
    ),
    # It has absolute positions, which padding shifts unless generate passes position ids.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_correct_models_pass(model: str, dtype: torch.dtype):
    results = parity.check(MODELS[model]().to(dtype).eval())
    assert results.keys() == GATES
    assert all(result.passed for result in results.values()), results
    assert all(result.tolerance == parity.TOLERANCE[dtype] for result in results.values())


def ignores_padding(model: Any) -> None:
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None, position_ids=None, **rest: forward(input_ids, **rest)


def forgets_its_state(model: Any) -> None:
    """Break decoding: one layer starts every step with an empty state."""
    forward = model.model.layers[1].mixer.forward

    def forgetful(x: Tensor, *, cache: dict | None = None, **rest: Any) -> Tensor:
        if cache is not None and x.shape[1] == 1:
            cache["state"].zero_()
        return forward(x, cache=cache, **rest)

    model.model.layers[1].mixer.forward = forgetful


def reads_ahead(model: Any) -> None:
    """Break causality: in one pass over all tokens, every position depends on the last token."""
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda x, **rest: forward(x + x[:, -1:], **rest)


@pytest.mark.parametrize(
    ("breaks", "failing"),
    [
        (ignores_padding, {"padded = unpadded"}),
        (forgets_its_state, {"cached = uncached", "prefill + decode = forward"}),
        (reads_ahead, {"cached = uncached", "prefill + decode = forward"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_models_are_found(breaks: Callable[[Any], None], failing: set[str], dtype: torch.dtype):
    model = hybrid().to(dtype)
    breaks(model)
    assert {gate for gate, result in parity.check(model).items() if not result.passed} == failing


def test_nan_passes_no_gate():
    sound, broken = torch.randn(2, 3, 8), torch.full((2, 3, 8), torch.nan)
    for pair in ((sound, broken), (broken, sound), (broken, broken)):
        assert not parity.Result(parity.error(*pair), 1e9).passed
    assert parity.error(sound, sound + 3) < 1e-6  # softmax ignores a constant


def test_short_models_get_short_prompts():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=20, n_embd=32, n_layer=1, n_head=2, eos_token_id=1)
    ).eval()
    assert all(result.passed for result in parity.check(model, max_length=20).values())
    with pytest.raises(ValueError, match="max_length: expected at least 10 for the parity gates, got 9"):
        parity.check(model, max_length=9)
