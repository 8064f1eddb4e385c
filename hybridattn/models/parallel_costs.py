"""Formulas for memory and communication per GPU when training with ``sequence_parallel`` and FSDP2.

``python -m hybridattn.models.parallel_costs`` prints the tables of docs/scaling.md, which lists the assumptions. All
numbers are bytes. Communication is counted as the bytes that the busiest GPU sends.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from ..layers import ShortConvolution, SoftmaxAttention
from ..layers.parallel.state_passing import TOKENS_AT_ONCE
from ..layers.recurrent import RecurrentMixer
from .decoder import HybridAttnConfig
from .decoder.loss import LOGITS_PER_CHUNK
from .decoder.sizes import blocks, parameters_of

FP32 = torch.float32.itemsize


class Sent(NamedTuple):
    """Bytes that a rank sends in a forward pass and in a backward pass."""

    forward: int
    backward: int


class Memory(NamedTuple):
    """Bytes in the memory of one GPU, by use.

    Attributes:
        weights: a GPU's shard of parameters, gradients and Adam's two moments, fp32.
        gathered: unsharded tensors of FSDP2, the larger of two sums. The first, after the backward pass of a layer:
            in ``dtype`` its parameters and gradients, the parameters of the next layer, the embeddings and the head;
            in fp32 the gradients of the previous layer, which FSDP2 is scattering. The second, at the end: embeddings
            and head in ``dtype``, and their gradients in ``dtype`` and in fp32.
        checkpoints: the input of every layer.
        layer: activations of a recomputed layer, the maximum over layers: four times the outputs of its linear maps.
        exchange: buffers of a mixer's exchange, the maximum over mixers. Linear attention: the states of all segments,
            four times (gathered, scanned, initial states, their gradients), and temporaries of their sums. Full
            attention: two more blocks of keys and values, fp32 gradients of three blocks, and gradients of the queries.
        loss: logits of one chunk, their log-softmax and their gradients, fp32.
    """

    weights: int
    gathered: int
    checkpoints: int
    layer: int
    exchange: int
    loss: int


class State(NamedTuple):
    """Shape of a linear layer's state [heads,keys,values] and decays [heads,decays], sent once per row and segment."""

    heads: int
    keys: int
    values: int
    decays: int

    @property
    def elements(self) -> int:
        return self.heads * (self.keys * self.values + self.decays)


def state_of(module: nn.Module) -> State | None:
    """Return the size of a linear attention layer's state, or None for other modules."""
    if not isinstance(module, RecurrentMixer):
        return None
    values = module.value_dim + module.normalize  # a normaliser is one more value
    return State(module.state_heads, module.state_dim, values, module.decays)


def traffic(
    config: HybridAttnConfig,
    *,
    tokens: int,
    ranks: int,
    batch_size: int = 1,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Sent]:
    """Return the bytes that the busiest rank sends in one pass over a sequence, by kind of exchange.

    The kinds are those of ``SequenceParallel.traffic``. A recomputed layer sends its forward part twice. The labels,
    8 bytes per border and row, are not counted.

    Args:
        tokens: length of the sequence, a multiple of the number of segments. A segment must be at least as long as
            windows and convolution kernels.
        ranks: number of ranks that share the sequence.
        batch_size: number of rows.
        layout: ``"contiguous"`` or ``"zigzag"``.
        dtype: dtype of activations.
    """
    segments = 1 if layout == "contiguous" else 2  # per rank
    # A halo goes to the next segment. In zigzag the middle two segments are on one rank; with two ranks, more are.
    borders = 0 if ranks == 1 else 1 if layout == "contiguous" or ranks == 2 else 2
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for module in (module for layer in blocks(config) for module in layer.modules()):
        if state := state_of(module):
            both = {"states": segments * (ranks - 1) * batch_size * state.elements * FP32}
            forward.update(both)
            backward.update(both)
        elif isinstance(module, ShortConvolution):
            both = {
                "convolution": borders * batch_size * (module.kernel_size - 1) * module.hidden_size * dtype.itemsize
            }
            forward.update(both)
            backward.update(both)
        elif isinstance(module, SoftmaxAttention):
            pair = 2 * batch_size * module.num_key_value_heads * module.head_dim  # a token's key and value
            share = (ranks - 1) * tokens // ranks * pair
            if module.window is not None:
                both = {"window": borders * (module.window - 1) * pair * dtype.itemsize}
            elif module.alibi is not None:
                both = {"keys": share * dtype.itemsize}
            else:
                both = {"ring": share * dtype.itemsize}
                backward.update(ring=share * FP32)
            forward.update(both)
            backward.update(both)
    return {kind: Sent(forward[kind], backward[kind]) for kind in forward}


def sharded_traffic(config: HybridAttnConfig, *, gpus: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes that a GPU sends for FSDP2 in a step, with ``fully_shard`` on every layer and on the model.

    FSDP2 gathers all parameters in ``dtype``, gathers the layers' parameters again in the backward pass, and scatters
    gradients in fp32.
    """
    *layers, rest = parameters_of(config)
    total = sum(layers) + rest
    return (gpus - 1) * ((sum(layers) + total) * dtype.itemsize + total * FP32) // gpus


def memory(
    config: HybridAttnConfig,
    *,
    tokens: int,
    ranks: int,
    gpus: int | None = None,
    batch_size: int = 1,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.bfloat16,
) -> Memory:
    """Return the memory of one GPU in training, with activation checkpointing of every layer.

    Args:
        gpus: number of GPUs that share the parameters (FSDP2); ``ranks`` by default.
        tokens, ranks, batch_size, layout, dtype: as in ``traffic``.
    """
    layers, here = blocks(config), batch_size * tokens // ranks
    *sizes, rest = parameters_of(config)
    maps = [sum(m.out_features for m in layer.modules() if isinstance(m, nn.Linear)) for layer in layers]
    segments = ranks * (1 if layout == "contiguous" else 2)
    exchange = [0]
    for module in (module for layer in layers for module in layer.modules()):
        if state := state_of(module):
            # For TOKENS_AT_ONCE tokens: gates in fp64, their forward and backward sums, and the weighted keys.
            summing = 40 * min(here, batch_size * TOKENS_AT_ONCE) * state.heads * state.keys
            exchange.append(4 * segments * batch_size * state.elements * FP32 + summing)
        elif isinstance(module, SoftmaxAttention) and module.window is None:
            pair = 2 * module.num_key_value_heads * module.head_dim
            of_blocks = 2 * dtype.itemsize + 3 * FP32
            exchange.append(here * (pair * of_blocks + module.num_heads * module.head_dim * FP32))
    return Memory(
        weights=16 * (sum(sizes) + rest) // (gpus or ranks),
        gathered=max(
            (3 * dtype.itemsize + FP32) * max(sizes) + 2 * dtype.itemsize * rest, (2 * dtype.itemsize + FP32) * rest
        ),
        checkpoints=len(layers) * here * config.hidden_size * dtype.itemsize,
        layer=4 * here * max(maps) * dtype.itemsize,
        exchange=max(exchange),
        loss=3 * min(LOGITS_PER_CHUNK, here * config.vocab_size) * FP32,
    )


def _shape(hidden: int, intermediate: int, layers: int, mixers: str) -> HybridAttnConfig:
    """Return a model of this shape: GLA with 4 heads; softmax attention with head size 128, 4 query heads per key head.

    The shape of the smaller model is that of gla_1b3.
    """
    softmax = {"num_heads": hidden // 128, "num_key_value_heads": hidden // 512}
    options = {"gla": {"num_heads": 4}, "window": {**softmax, "window": 2048}, "full": softmax}
    return HybridAttnConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        mixers=mixers,
        mixer_options=options,
    )


STACKS = {"GLA": "1 gla", "1 window : 1 GLA": "1 window : 1 gla", "1 full : 7 GLA": "1 full : 7 gla", "full": "1 full"}
TABLES = {
    "1.3B at 1M tokens": (2048, 5632, 24, 2**20, (8, 16, 32, 64)),
    "7B at 256k tokens": (4096, 11008, 32, 2**18, (8, 16, 32)),
}


def tables() -> str:
    """Return the tables of docs/scaling.md as Markdown."""
    lines = []
    for title, (hidden, intermediate, layers, tokens, counts) in TABLES.items():
        lines += [
            f"### {title}",
            "",
            "| stack | parameters | GPUs | tokens per GPU | weights | gathered | checkpoints | layer | exchange | loss "
            "| memory, GB | linear, MB | window, MB | full, GB | FSDP2, GB |",
            "|" + "---|" * 15,
        ]
        for name, mixers in STACKS.items():
            config = _shape(hidden, intermediate, layers, mixers)
            layout = "zigzag" if "full" in mixers else "contiguous"
            for ranks in counts:
                parts = memory(config, tokens=tokens, ranks=ranks, layout=layout)
                sent = traffic(config, tokens=tokens, ranks=ranks, layout=layout)
                step = {kind: 2 * x.forward + x.backward for kind, x in sent.items()}  # checkpointing: two forwards
                row = [
                    name,
                    f"{sum(parameters_of(config)) / 1e9:.2f}B",
                    str(ranks),
                    f"{tokens // ranks:,}",
                    *(f"{x / 1e9:.1f}" for x in (*parts, sum(parts))),
                    f"{step.get('states', 0) / 1e6:,.0f}",
                    f"{step.get('window', 0) / 1e6:,.0f}",
                    f"{step.get('ring', 0) / 1e9:,.1f}",
                    f"{sharded_traffic(config, gpus=ranks) / 1e9:.1f}",
                ]
                lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(), end="")
