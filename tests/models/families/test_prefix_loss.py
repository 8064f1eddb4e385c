"""The training loss of JRT models."""

import math

import pytest
import torch
from torch.nn import functional as F

from hybridattn import HybridAttnForCausalLM, HybridAttnJRTConfig
from hybridattn.models.families.prefix_loss import prefix_loss

MASK, VOCAB = 1, 40


def make() -> HybridAttnForCausalLM:
    options = {"prefix": {"num_heads": 2, "key_dim": 4}, "window": {"num_heads": 2, "window": 3}}
    config = HybridAttnJRTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        mixers=["conv", "prefix", "window"],
        mixer_options=options,
        initializer="fan_in",
    )
    return HybridAttnForCausalLM(config)


def test_the_loss_is_that_of_next_tokens_outside_and_masked_tokens_inside():
    model, ids, lengths = make(), torch.randint(2, VOCAB, (3, 40)), torch.tensor([20, 0, 40])
    loss = prefix_loss(model, ids, lengths, mask_token_id=MASK, generator=torch.Generator().manual_seed(3))
    chosen = torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) < 0.15
    masked = [(b, t) for b in range(3) for t in range(int(lengths[b])) if chosen[b, t]]
    corrupted = ids.clone()
    for place in masked:
        corrupted[place] = MASK
    logs = F.log_softmax(model(corrupted, prefix_lengths=lengths).logits, -1)
    outside = [-logs[b, t - 1, ids[b, t]] for b in range(3) for t in range(max(1, int(lengths[b])), 40)]
    inside = [-logs[b, t, ids[b, t]] for b, t in masked]
    assert len(inside) > 3
    torch.testing.assert_close(loss, sum(outside) / len(outside) + 0.25 * sum(inside) / len(inside))


def test_every_parameter_of_the_prefix_learns():
    model = make()
    prefix_loss(model, torch.randint(2, VOCAB, (2, 30)), torch.tensor([15, 15]), mask_token_id=MASK).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.slow
def test_masked_tokens_are_learnt_from_both_sides():
    """Each row repeats one token, so that a masked token is predictable from its neighbours."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        ids = torch.randint(2, VOCAB, (16, 1)).expand(16, 24)
        loss = prefix_loss(model, ids, torch.full((16,), 24), mask_token_id=MASK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * 0.25 * math.log(VOCAB)


def test_bad_prefix_lengths_are_refused():
    for lengths in (torch.tensor([1]), torch.tensor([3, 31]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match="prefix_lengths: expected 2 numbers from 0 to 30"):
            prefix_loss(make(), torch.randint(2, VOCAB, (2, 30)), lengths, mask_token_id=MASK)
