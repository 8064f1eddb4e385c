import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridattn.evals.speed import latency
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM


@pytest.fixture(scope="module")
def model() -> HybridAttnForCausalLM:
    config = HybridAttnConfig(
        vocab_size=32, hidden_size=16, mixers=["full", "gla"], mixer_options={"gla": {"num_heads": 1}}, mlp="none"
    )
    return HybridAttnForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=1, **sizes)).eval()


def test_prefill_and_decode_are_measured_apart(model: HybridAttnForCausalLM):
    shapes: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prefill = latency.prefill(model, tokens=64, least=10, seconds=0)
    assert shapes == [(1, 64)] * 11  # one warm-up call
    shapes.clear()
    decode = latency.decode(model, tokens=64, batch=4, least=10, seconds=0)
    hook.remove()
    assert shapes == [(1, 64)] + [(4, 1)] * 11
    assert len(prefill) == len(decode) == 10
    assert min(*prefill, *decode) > 0


def test_decoding_continues_the_prompt(model: HybridAttnForCausalLM):
    cache, token = latency.filled(model, tokens=12, batch=3)
    prompt, tokens = latency.random_prompt(model, 1, 12), [token]
    with torch.inference_mode():
        for _ in range(5):
            tokens.append(latency.next_token(model(input_ids=tokens[-1], past_key_values=cache).logits))
        written = torch.cat(tokens, dim=1)
        whole = torch.cat([prompt, written[:1]], dim=1)
        expected = model(input_ids=whole).logits[:, 11:-1].argmax(-1)
    assert torch.equal(expected, whole[:, 12:])
    assert torch.equal(written, written[:1].expand(3, -1))


@pytest.mark.parametrize("which", ["model", "llama"])
def test_the_cache_is_filled_for_the_whole_batch(which: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue(which)
    one, _ = latency.filled(model, tokens=12)
    three, token = latency.filled(model, tokens=12, batch=3)
    assert three.get_seq_length() == 12
    assert token.shape == (3, 1)
    with torch.inference_mode():
        logits = [model(input_ids=t, past_key_values=c).logits for c, t in ((one, token[:1]), (three, token))]
    torch.testing.assert_close(logits[0].expand(3, -1, -1), logits[1])


def test_training_leaves_the_model_as_it_was(model: HybridAttnForCausalLM):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert len(latency.training(model, tokens=16, batch=2, least=3, seconds=0)) == 3
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_graph_needs_a_gpu(model: HybridAttnForCausalLM):
    with pytest.raises(ValueError, match="graph: expected a model on a GPU, got cpu"):
        latency.decode(model, tokens=4, graph=True)


def test_the_kernel_of_attention_is_named(model: HybridAttnForCausalLM, llama: LlamaForCausalLM):
    assert latency.attention_operators(llama) == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert "hybridattn::linear_attention_chunked" in latency.attention_operators(model)
