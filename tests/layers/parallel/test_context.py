"""The sequence_parallel context in a group of one process: arguments, errors and results."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointError
from transformers import AutoModelForCausalLM, LlamaConfig

from hybridattn import (
    HybridAttnConfig,
    HybridAttnForCausalLM,
    HybridAttnForSequenceClassification,
    gather_sequence,
    sequence_parallel,
    shard_sequence,
)
from hybridattn.layers import Cache, GatedLinearAttention, PrefixLinearAttention
from hybridattn.layers.parallel import current


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def decoder(**options: Any) -> HybridAttnForCausalLM:
    return HybridAttnForCausalLM(
        HybridAttnConfig(
            vocab_size=20, hidden_size=8, pad_token_id=0, **{"mixers": ["gla", "window", "full"], **options}
        )
    )


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_rank_sends_nothing(layout: str):
    net, ids = decoder(), torch.randint(20, (2, 9))
    expected = net(ids, labels=ids)
    with sequence_parallel(tokens=9, layout=layout) as context:
        assert torch.equal(shard_sequence(ids), ids)
        out = net(ids, labels=ids)
        out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(gather_within(out.logits, 9), expected.logits, rtol=1e-4, atol=1e-5)
    assert not any(context.traffic.values())


def gather_within(x: torch.Tensor, tokens: int) -> torch.Tensor:
    with sequence_parallel(tokens=tokens):
        return gather_sequence(x)


def test_the_context_ends_also_with_an_error():
    with sequence_parallel(tokens=4) as outer:
        with pytest.raises(RuntimeError), sequence_parallel(tokens=8):
            raise RuntimeError
        assert current() is outer
    assert current() is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layout": (
        {"tokens": 4, "layout": "striped"},
        r"layout: expected one of \['contiguous', 'zigzag'\], got 'striped'",
    ),
    "segments": ({"tokens": [3, 1]}, r"tokens: expected an integer, or the lengths of 1 segments .*, got \[3, 1\]"),
    "a fraction": ({"tokens": 4.0}, "tokens: expected an integer, or the lengths of 1 segments .*, got 4.0"),
    "half a token": ({"tokens": [2.5]}, r"tokens: expected an integer, or the lengths of 1 segments .*, got \[2.5\]"),
    "a negative length": (
        {"tokens": [5, -1], "layout": "zigzag"},
        "tokens: expected an integer, or the lengths of 2 segments",
    ),
}


def test_tokens_may_be_an_integer_of_numpy_or_torch():
    for tokens in (np.int64(4), np.array([4]), torch.tensor([4])):
        with sequence_parallel(tokens) as context:
            assert context.own == [(0, 0, 4)]


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message), sequence_parallel(**options):
        pass


def test_a_group_is_needed():
    dist.destroy_process_group()
    try:
        with pytest.raises(ValueError, match=r"group: expected torch\.distributed to be initialised"):
            sequence_parallel(tokens=4).__enter__()
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_mesh_of_two_dimensions_is_refused():
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "sp"))
    with pytest.raises(ValueError, match="group: expected a mesh of one dimension, got 2"):
        sequence_parallel(4, mesh).__enter__()
    with sequence_parallel(4, mesh["sp"]) as context:
        assert context.size == 1


def test_checkpointed_layers_need_the_context_in_the_backward_pass():
    net, ids = decoder(), torch.randint(20, (1, 9))
    # transformers 5.17 has the second name only.
    getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)()
    net.train()
    with sequence_parallel(tokens=9):
        loss = net(ids, labels=ids, use_cache=False).loss
    with pytest.raises(CheckpointError):
        loss.backward()


def test_with_labels_there_is_no_cache_by_default():
    net, ids, offsets = decoder(), torch.randint(20, (1, 9)), torch.tensor([0, 4, 9])
    with sequence_parallel(tokens=9):
        assert net(ids, labels=ids).past_key_values is None
        assert net(ids, labels=ids, cu_seq_lens_q=offsets).loss.isfinite()
        assert net(ids, labels=ids, use_cache=True).past_key_values.get_seq_length() == 9
        assert net(ids).past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("skip_logits", [False, True])
def test_shift_labels_replace_the_labels(skip_logits: bool):
    net, ids, targets = decoder(), torch.randint(20, (2, 9)), torch.randint(20, (2, 9))
    targets[:, 3] = -100
    options = {"labels": ids, "shift_labels": targets, "skip_logits": skip_logits}
    expected = net(ids, **options).loss
    with sequence_parallel(tokens=9):
        torch.testing.assert_close(net(ids, **options).loss, expected)
        with pytest.raises(ValueError, match="shift_labels: expected 9 tokens"):
            net(ids, **{**options, "shift_labels": targets[:, 1:]})


def test_sharding_outside_the_context_is_refused():
    for function in (shard_sequence, gather_sequence):
        with pytest.raises(ValueError, match="sequence_parallel: expected an active context, got none"):
            function(torch.zeros(1, 4))


def test_tensors_of_another_length_are_refused():
    x = torch.randn(1, 5, 8)
    with sequence_parallel(tokens=4):
        with pytest.raises(ValueError, match=r"x: expected 4 tokens in dimension 1, got \[1, 5, 8\]"):
            shard_sequence(x)
        with pytest.raises(ValueError, match="x: expected 4 tokens, rank 0's share of 4 under sequence_parallel"):
            gather_sequence(x)
        with pytest.raises(ValueError, match="hidden_states: expected 4 tokens, rank 0's share"):
            GatedLinearAttention(8, num_heads=2)(x)
        with pytest.raises(ValueError, match="labels: expected 4 tokens"):
            decoder()(torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 5, dtype=torch.long))


def test_offsets_are_of_the_whole_sequence():
    mixer, x = GatedLinearAttention(8, num_heads=2), torch.randn(1, 4, 8)
    with sequence_parallel(tokens=4), pytest.raises(ValueError, match="cu_seqlens: expected ascending offsets"):
        mixer(x, cu_seqlens=torch.tensor([0, 3, 7]))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_changed_offsets_are_read_again(mode: Any):
    with mode():
        check_changed_offsets()


def check_changed_offsets() -> None:
    mixer, x, offsets = GatedLinearAttention(8, num_heads=2), torch.randn(1, 4, 8), torch.tensor([0, 1, 4])
    with sequence_parallel(tokens=4):
        before = mixer(x, cu_seqlens=offsets)
        offsets[1] = 3
        after = mixer(x, cu_seqlens=offsets)
    torch.testing.assert_close(after, mixer(x, cu_seqlens=offsets))
    assert not torch.allclose(before, after)


def test_unsupported_caches_are_refused():
    mixer, x, cache = GatedLinearAttention(8, num_heads=2), torch.randn(1, 4, 8), Cache()
    with sequence_parallel(tokens=4):
        with pytest.raises(ValueError, match="cache: expected None with cu_seqlens under sequence_parallel"):
            mixer(x, cu_seqlens=torch.tensor([0, 4]), cache=cache)
        mixer(x, cache=cache)
        with pytest.raises(ValueError, match=r"cache: expected an empty cache, got one .* under sequence_parallel"):
            mixer(x, cache=cache)


def test_unsupported_calls_are_refused():
    ids = torch.ones(1, 4, dtype=torch.long)
    padding = torch.tensor([[0, 1, 1, 1]])
    classifier = HybridAttnForSequenceClassification(decoder().config)
    llama = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2),
        attn_implementation="hybridattn",
    )
    prefix = PrefixLinearAttention(8, key_dim=2)
    with sequence_parallel(tokens=4):
        with pytest.raises(ValueError, match=r"prefix_lengths: expected None .* under sequence_parallel"):
            prefix(torch.randn(1, 4, 8), prefix_lengths=torch.tensor([2]))
        with pytest.raises(ValueError, match=r"attention_mask: expected no padding .* under sequence_parallel"):
            decoder()(ids, attention_mask=padding)
        with pytest.raises(ValueError, match="HybridAttnForSequenceClassification: expected no sequence parallelism"):
            classifier(ids)
        with pytest.raises(ValueError, match="attn_implementation='hybridattn': expected no context"):
            llama(ids)
