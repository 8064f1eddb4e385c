import time

import pytest
import torch

from hybridattn.evals.throughput import measure
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM


@pytest.fixture(scope="module")
def model() -> HybridAttnForCausalLM:
    config = HybridAttnConfig(
        vocab_size=32, hidden_size=16, mixers=["full", "gla"], mixer_options={"gla": {"num_heads": 1}}, mlp="none"
    )
    return HybridAttnForCausalLM(config).eval()


def test_a_rate_is_work_over_time():
    waits = iter([0.5, *[0.01] * 12, *[0.03] * 8])
    rate = measure.rate(lambda: time.sleep(next(waits)), work=10, samples=20, warmup=1)
    assert rate.samples == 20
    assert 500 < rate.median <= 1000
    assert 150 < rate.p90 <= 334


def test_ninety_of_a_hundred_calls_are_at_least_as_fast_as_p90():
    waits = iter([*[0.001] * 18, 0.1, 0.1])
    assert measure.rate(lambda: time.sleep(next(waits)), work=1, samples=20, warmup=0).p90 > 50


def test_fewer_than_ten_samples_are_refused():
    with pytest.raises(ValueError, match="samples: expected at least 10, got 9"):
        measure.rate(lambda: None, work=1, samples=9, warmup=0)


def test_prefill_and_decode_are_measured_apart(model: HybridAttnForCausalLM):
    lengths: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prefill = measure.prefill(model, tokens=64, samples=10, warmup=1)
    assert lengths == [(1, 64)] * 11
    lengths.clear()
    decode = measure.decode(model, tokens=64, batch=4, samples=10, warmup=1)
    hook.remove()
    assert lengths == [(4, 64)] + [(4, 1)] * 11
    assert prefill.median >= prefill.p90 > 0
    assert decode.median >= decode.p90 > 0


def test_decoding_continues_the_prompt(model: HybridAttnForCausalLM):
    prompt = measure.random_prompt(model, 2, 12)
    with torch.inference_mode():
        cache, token = measure.read(model, prompt)
        tokens = [token]
        for _ in range(5):
            tokens.append(measure.next_token(model(input_ids=tokens[-1], past_key_values=cache).logits))
        whole = torch.cat([prompt, *tokens], dim=1)
        expected = model(input_ids=whole).logits[:, 11:-1].argmax(-1)
    assert torch.equal(expected, whole[:, 12:])


def test_the_cache_is_filled_for_the_whole_batch(model: HybridAttnForCausalLM):
    cache = measure.filled_cache(model, tokens=12, batch=3)
    assert cache.get_seq_length() == 12
    assert {tensor.shape[0] for layer in cache.layers for tensor in layer.tensors.values()} == {3}
