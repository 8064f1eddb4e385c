"""prefix_lengths in the decoder: padding, packing, caches, generation, checkpointing, and models without prefix."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM

VOCAB, PAD, LENGTHS, PREFIXES = 40, 0, (13, 7, 1), (9, 0, 1)


@pytest.fixture
def model() -> HybridAttnForCausalLM:
    config = HybridAttnConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        mixers=["conv", "prefix", "window", "prefix"],
        mixer_options={"prefix": {"num_heads": 2, "key_dim": 4}, "window": {"num_heads": 2, "window": 5}},
        input_conv_size=3,
        initializer="fan_in",
        pad_token_id=PAD,
        eos_token_id=1,
    )
    return HybridAttnForCausalLM(config).eval()


def padded(side: str, width: int = 16) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Return rows [1,n] of LENGTHS, the same rows padded, the mask, and the indices of the real tokens."""
    rows = [torch.randint(2, VOCAB, (1, n)) for n in LENGTHS]
    ids, mask, places = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.long), []
    for n, row in enumerate(rows):
        length = row.shape[1]
        at = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "inside": torch.randperm(width)[:length].sort().values,
        }[side]
        ids[n, at], mask[n, at] = row[0], 1
        places.append(at)
    return rows, ids, mask, places


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_prefix_lengths_count_real_tokens(model: HybridAttnForCausalLM, side: str):
    rows, ids, mask, places = padded(side)
    logits = model(ids, attention_mask=mask, prefix_lengths=torch.tensor(PREFIXES)).logits
    for n, (row, prefix, at) in enumerate(zip(rows, PREFIXES, places, strict=True)):
        close(logits[n, at], model(row, prefix_lengths=torch.tensor([prefix])).logits[0])
    assert not torch.allclose(logits[0, places[0]], model(rows[0]).logits[0], atol=1e-2)


@torch.no_grad()
def test_packed_rows(model: HybridAttnForCausalLM):
    rows, *_ = padded("right")
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed = model(torch.cat(rows, 1), cu_seq_lens_q=ends, prefix_lengths=torch.tensor(PREFIXES)).logits[0]
    for row, prefix, part in zip(rows, PREFIXES, packed.split(LENGTHS), strict=True):
        close(part, model(row, prefix_lengths=torch.tensor([prefix])).logits[0])


@torch.no_grad()
def test_a_cache_is_continued_without_the_prefix(model: HybridAttnForCausalLM):
    ids, lengths = torch.randint(2, VOCAB, (2, 12)), torch.tensor([8, 3])
    expected = model(ids, prefix_lengths=lengths).logits
    out = model(ids[:, :8], prefix_lengths=lengths, use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    parts += [model(part, past_key_values=cache).logits for part in ids[:, 8:].split([2, 1, 1], 1)]
    close(torch.cat(parts, 1), expected)
    with pytest.raises(ValueError, match="prefix_lengths: expected None after the first call with a cache"):
        model(ids[:, :1], past_key_values=cache, prefix_lengths=lengths)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}], ids=str
)
def test_generate_equals_recomputing_every_token(model: HybridAttnForCausalLM, options: dict[str, Any]):
    """In a left-padded batch: against greedy search token by token, and with beams against each row alone."""
    rows, ids, mask, _ = padded("left")
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, **options}
    batch = model.generate(ids, attention_mask=mask, prefix_lengths=torch.tensor(PREFIXES), **arguments)
    for n, (row, prefix) in enumerate(zip(rows, PREFIXES, strict=True)):
        lengths, expected = torch.tensor([prefix]), row
        if "num_beams" in options:
            expected = model.generate(row, prefix_lengths=lengths, **{**arguments, "use_cache": False})
        else:
            for _ in range(8):
                new = model(expected, prefix_lengths=lengths).logits[:, -1:].argmax(-1)
                expected = torch.cat((expected, new), 1)
        assert torch.equal(batch[n, ids.shape[1] :], expected[0, row.shape[1] :])
    unprefixed = model.generate(ids, attention_mask=mask, **arguments)
    assert not torch.equal(unprefixed, batch)


def test_errors_name_bad_prefix_lengths(model: HybridAttnForCausalLM):
    ids, mask = torch.randint(2, VOCAB, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(
        ValueError, match=r"prefix_lengths: expected 0 to each sequence's length .*\[3, 5\], got \[4, 5\]"
    ):
        model(ids, attention_mask=mask, prefix_lengths=torch.tensor([4, 5]))
    other = HybridAttnForCausalLM(HybridAttnConfig(vocab_size=VOCAB, hidden_size=16, mixers=["conv", "taylor"]))
    with pytest.raises(
        ValueError, match=r"prefix_lengths: expected None without a 'prefix' mixer in \['conv', 'taylor'\]"
    ):
        other(ids, prefix_lengths=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="prefix_lengths: expected None without a 'prefix' mixer"):
        other.generate(ids, prefix_lengths=torch.tensor([2, 2]), max_new_tokens=2)
