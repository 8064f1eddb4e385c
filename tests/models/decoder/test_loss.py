"""The loss computed in chunks: values and memory. test_sequence_parallel.py tests it under FSDP2."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import profile

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM, loss

OURS = pytest.mark.parametrize("ours", [False, True], ids=["torch", "chunks"])


@pytest.fixture
def chunks(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set chunks of 16 tokens; with ``ours``, disable torch's operator, so that this package computes them."""
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 16 * 1000)
    if ours:
        monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(2, 100, 24, requires_grad=True), torch.randn(1000, 24, requires_grad=True)
    labels = torch.randint(1000, (2, 100))
    labels[:, 30:40] = -100
    return hidden, weight, labels


@OURS
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("items", [None, 77])
def test_the_loss_equals_the_cross_entropy_of_the_logits(items: int | None):
    hidden, weight, labels = operands()
    value = loss.next_token_loss(hidden, weight, labels, items)
    logits = F.linear(hidden, weight)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / (
        items or (labels[:, 1:] != -100).sum()
    )
    torch.testing.assert_close(value, expected)
    grads, wanted = (torch.autograd.grad(x, (hidden, weight)) for x in (value, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-6)


@OURS
@pytest.mark.usefixtures("chunks")
def test_memory_never_holds_all_logits():
    hidden, weight, labels = operands()
    with profile(profile_memory=True) as measured:
        loss.next_token_loss(hidden, weight, labels).backward()
    largest = max(event.self_cpu_memory_usage for event in measured.events())
    assert largest < 0.5 * 200 * 1000 * 4  # bytes, half of all logits in fp32


@pytest.mark.parametrize("ours", [True])
@pytest.mark.usefixtures("chunks")
def test_under_autocast_the_loss_is_summed_in_fp32():
    hidden, weight, labels = operands()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss.next_token_loss(hidden, weight, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss.next_token_loss(hidden, weight, labels), rtol=2e-3, atol=0)
    assert torch.autograd.grad(value, weight)[0].dtype == torch.float32


def model() -> HybridAttnForCausalLM:
    return HybridAttnForCausalLM(HybridAttnConfig(vocab_size=40, hidden_size=16, mixers=["gla", "full"]))


def test_skip_logits_gives_the_same_loss():
    net, tokens = model(), torch.randint(40, (2, 9))
    expected, out = net(tokens, labels=tokens), net(tokens, labels=tokens, skip_logits=True)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.logits is None
    with pytest.raises(ValueError, match="skip_logits"):
        net(tokens, skip_logits=True)
