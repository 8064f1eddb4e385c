"""Formulas of memory and communication, compared with counts by hand, autograd's saved tensors and docs/scaling.md.

tests/models/decoder/test_sequence_parallel.py holds them against the bytes that several processes send and keep.
"""

from pathlib import Path

import pytest
import torch

from hybridattn import HybridAttnConfig
from hybridattn.evals.speed.memory import peak_bytes
from hybridattn.models import parallel_costs
from hybridattn.models.decoder import loss
from hybridattn.models.decoder.modeling import DecoderLayer
from hybridattn.models.decoder.sizes import blocks
from hybridattn.models.parallel_costs import memory, sharded_traffic, tables, traffic

DOC = Path(__file__).parents[2] / "docs" / "scaling.md"


def config(*mixers: str, vocab_size: int = 100) -> HybridAttnConfig:
    softmax = {"num_heads": 4, "num_key_value_heads": 2}
    options = {"full": softmax, "window": {**softmax, "window": 16}, "gla": {"num_heads": 2}}
    return HybridAttnConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, mixers=list(mixers), mixer_options=options
    )


# 2 rows, 8 ranks, bf16. GLA: 2 heads of 16 x 32 and 16 decays, fp32, to 7 others. Windows: 15 keys and values, 2 heads
# of 16. Full attention: 7 blocks of 128 tokens' keys and values, backward with their gradients in fp32.
BY_HAND = {
    ("gla", "contiguous"): {"states": (7 * 2 * 2 * (16 * 32 + 16) * 4,) * 2},
    ("gla", "zigzag"): {"states": (2 * 7 * 2 * 2 * (16 * 32 + 16) * 4,) * 2},
    ("window", "contiguous"): {"window": (2 * 15 * 2 * 2 * 16 * 2,) * 2},
    ("window", "zigzag"): {"window": (2 * 2 * 15 * 2 * 2 * 16 * 2,) * 2},
    ("full", "zigzag"): {"ring": (7 * 2 * 128 * 2 * 2 * 16 * 2, 7 * 2 * 128 * 2 * 2 * 16 * (2 + 4))},
}


@pytest.mark.parametrize(("mixer", "layout"), BY_HAND)
def test_traffic_by_hand(mixer: str, layout: str):
    assert traffic(config(mixer), tokens=1024, ranks=8, batch_size=2, layout=layout) == BY_HAND[mixer, layout]


def test_traffic_of_layers_adds_up():
    one, two = (traffic(config(*["gla"] * n), tokens=64, ranks=4)["states"] for n in (1, 2))
    assert two == tuple(2 * x for x in one)


def test_one_gpu_sends_nothing():
    sent = traffic(config("gla", "window", "full", "conv"), tokens=64, ranks=1)
    assert len(sent) == 4
    assert not any(x for both in sent.values() for x in both)
    assert sharded_traffic(config("gla"), gpus=1) == 0


@pytest.mark.parametrize("mixer", ["gla", "window", "full", "retention", "taylor", "conv"])
def test_a_layer_keeps_two_to_four_times_what_its_linear_maps_give(mixer: str):
    """``Memory.layer`` uses four times."""
    layer = DecoderLayer(config(mixer), 0).bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    x = torch.randn(1, 2048, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(x)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    most = memory(config(mixer), tokens=2048, ranks=1).layer
    assert most / 2 <= measured <= most


@pytest.mark.parametrize("vocab_size", [100, 1000])
def test_the_loss_takes_three_times_the_logits_of_a_chunk(vocab_size: int, monkeypatch: pytest.MonkeyPatch):
    chunk = 2**20 // 4
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", chunk)
    monkeypatch.setattr(parallel_costs, "LOGITS_PER_CHUNK", chunk)
    x = torch.randn(1, 4 * chunk // vocab_size, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, 4, requires_grad=True)
    labels = torch.randint(vocab_size, x.shape[:2])
    measured = peak_bytes(lambda: loss.next_token_loss(x, weight, labels).backward(), torch.device("cpu"))
    expected = memory(config("gla", vocab_size=vocab_size), tokens=x.shape[1], ranks=1).loss
    assert measured == pytest.approx(expected, rel=0.1)


def test_nothing_is_allocated():
    assert all(p.is_meta for layer in blocks(config("gla", "full")) for p in layer.parameters())


@pytest.mark.slow
def test_the_tables_in_the_documentation_are_those_of_the_code():
    assert tables().strip() in DOC.read_text(encoding="utf-8")
