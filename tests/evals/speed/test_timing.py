import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridattn.evals.speed import measure
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


class Clock:
    """A clock that only `sleep` moves, so that a busy machine does not show."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_a_sample_is_the_time_of_one_call(clock: Clock):
    waits = iter([2.0, 2.0, *[0.25] * 100])
    times, probe, memory = measure.sample(lambda: clock.sleep(next(waits)), least=12, seconds=4.1)
    assert times == [0.25] * 17
    assert probe == [1] * 17
    assert memory == []


def test_the_clock_is_a_real_one():
    assert 0.02 <= measure.timed(lambda: time.sleep(0.02)) < 10


@pytest.mark.parametrize(("took", "calls"), [(0.625, 1), (0.5, 2)])
def test_a_long_call_is_not_warmed_up_twice(clock: Clock, took: float, calls: int):
    waits = iter([took] * calls + [0.125] * 2)
    assert measure.sample(lambda: clock.sleep(next(waits)), least=2, seconds=0.0625).seconds == [0.125] * 2


def test_calls_go_on_until_they_took_their_time(clock: Clock):
    assert len(measure.sample(lambda: clock.sleep(0.125), least=2, seconds=2).seconds) == 16
    assert len(measure.sample(lambda: clock.sleep(0.125), least=20, seconds=2).seconds) == 20
    assert len(measure.sample(lambda: clock.sleep(0.125), least=2, seconds=60, most=30).seconds) == 30


class Disturbed:
    """A probe of a machine that is disturbed at every third call, and a clock that shows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int):
        self.calls, self.every = 0, every
        monkeypatch.setattr(measure, "timed", self.timed)

    def timed(self, call) -> float:
        self.calls += 1
        return 1.7 if self.calls % self.every == 0 else 1.0

    def seconds(self) -> float:
        return 1.2 if self.calls % self.every == 0 else 1.01

    def is_calm(self, seconds: float) -> bool:
        return seconds <= 1.05

    def wait(self, patience: float) -> float:
        self.patience = patience
        return 1.0

    def reads(self) -> list[float]:
        return [self.calls / 100] * 2


def test_calls_go_on_until_enough_samples_are_undisturbed(monkeypatch: pytest.MonkeyPatch):
    probe = Disturbed(monkeypatch, 3)
    times, beside, memory = measure.sample(lambda: None, least=4, seconds=5, probe=probe)  # pyright: ignore
    assert times == [1.0, 1.7, 1.0, 1.0, 1.7, 1.0, 1.0]  # the first of all calls does not count
    assert beside == [1.01, 1.2, 1.01, 1.01, 1.2, 1.01, 1.01]
    assert memory == [0, 0]  # read before the first call
    assert probe.patience == 25


def test_but_not_forever(monkeypatch: pytest.MonkeyPatch):
    probe = Disturbed(monkeypatch, 1)
    start = time.perf_counter()
    times, *_ = measure.sample(lambda: None, least=4, seconds=0.01, most=10**9, probe=probe)  # pyright: ignore
    assert 0.1 <= time.perf_counter() - start < 10
    assert set(times) == {1.7}
    assert len(measure.sample(lambda: None, least=4, seconds=0, probe=probe).seconds) == 4  # pyright: ignore


def test_prefill_and_decode_are_measured_apart(model: HybridAttnForCausalLM):
    shapes: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prefill = measure.prefill(model, tokens=64, least=10, seconds=0)
    assert shapes == [(1, 64)] * 11  # one that does not count
    shapes.clear()
    decode = measure.decode(model, tokens=64, batch=4, least=10, seconds=0)
    hook.remove()
    assert shapes == [(1, 64)] + [(4, 1)] * 11
    assert len(prefill.seconds) == len(decode.seconds) == 10
    assert min(*prefill.seconds, *decode.seconds) > 0


def test_decoding_continues_the_prompt(model: HybridAttnForCausalLM):
    cache, token = measure.filled(model, tokens=12, batch=3)
    prompt, tokens = measure.random_prompt(model, 1, 12), [token]
    with torch.inference_mode():
        for _ in range(5):
            tokens.append(measure.next_token(model(input_ids=tokens[-1], past_key_values=cache).logits))
        written = torch.cat(tokens, dim=1)
        whole = torch.cat([prompt, written[:1]], dim=1)
        expected = model(input_ids=whole).logits[:, 11:-1].argmax(-1)
    assert torch.equal(expected, whole[:, 12:])
    assert torch.equal(written, written[:1].expand(3, -1))


@pytest.mark.parametrize("which", ["model", "llama"])
def test_the_cache_is_filled_for_the_whole_batch(which: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue(which)
    one, _ = measure.filled(model, tokens=12)
    three, token = measure.filled(model, tokens=12, batch=3)
    assert three.get_seq_length() == 12
    assert token.shape == (3, 1)
    with torch.inference_mode():
        logits = [model(input_ids=t, past_key_values=c).logits for c, t in ((one, token[:1]), (three, token))]
    torch.testing.assert_close(logits[0].expand(3, -1, -1), logits[1])


def test_training_leaves_the_model_as_it_was(model: HybridAttnForCausalLM):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert len(measure.training(model, tokens=16, batch=2, least=3, seconds=0).seconds) == 3
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_graph_needs_a_gpu(model: HybridAttnForCausalLM):
    with pytest.raises(ValueError, match="graph: expected a model on a GPU, got cpu"):
        measure.decode(model, tokens=4, graph=True)


def test_the_kernel_of_attention_is_named(model: HybridAttnForCausalLM, llama: LlamaForCausalLM):
    assert measure.attention_operators(llama) == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert "hybridattn::linear_attention_chunked" in measure.attention_operators(model)
