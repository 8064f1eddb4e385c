"""Measure how many random key-value pairs the state of an untrained mixer can hold.

N random pairs are written directly into the state of a layer, bypassing its projections; then each key is used as a
query. Recall is the share of keys whose output has a larger inner product with their own value than with the N - 1
other values: 1/N by chance. Decays are those of the untrained layer.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridattn.kernels.flash_attention import flash_attention
from hybridattn.kernels.linear_attention import NormalizedState
from hybridattn.layers import LinearAttention, SoftmaxAttention, TokenMixer
from hybridattn.layers.linear_attention import FEATURE_MAPS
from hybridattn.layers.projected_recurrent import ProjectedRecurrentMixer
from hybridattn.models.decoder.mixers import build_mixer
from hybridattn.models.decoder.sizes import cache_elements


@torch.inference_mode()
def capacity(
    mixer: str, pairs: int, *, hidden_size: int = 64, trials: int = 8, seed: int = 0, **options: Any
) -> dict[str, float]:
    """Measure the recall of random pairs from the state of an untrained mixer with one head.

    Args:
        mixer: the mixer's name in the decoder's table.
        pairs: number of pairs, N.
        hidden_size: width of the layer, and dimension of values.
        trials: independent sets of pairs; the result is their mean.
        seed: seed of layer and pairs.
        options: options of the layer.

    Returns:
        ``recall``, and ``state_elements``, the number of elements in the state after N tokens.

    Raises:
        ValueError: the mixer has no state of keys and values.
    """
    torch.manual_seed(seed)
    layer = build_mixer(mixer, hidden_size, {"num_heads": 1, **options}) if mixer != "conv" else None
    if not isinstance(layer, LinearAttention | ProjectedRecurrentMixer | SoftmaxAttention):
        raise ValueError(f"mixer: expected one with a state of keys and values, got {mixer!r}")
    keys = torch.randn(trials, pairs, 1, layer.head_dim if isinstance(layer, SoftmaxAttention) else layer.key_dim)
    values = torch.randn(trials, pairs, 1, keys.shape[-1] if isinstance(layer, SoftmaxAttention) else layer.value_dim)
    read = _read(layer, keys, values)[:, :, 0]
    nearest = (read @ values[:, :, 0].mT).argmax(-1)
    spec = layer.cache_spec(1, pairs, torch.float32)
    return {
        "recall": (nearest == torch.arange(pairs)).float().mean().item(),
        "state_elements": float(cache_elements(spec)),
    }


def _read(layer: TokenMixer, keys: Tensor, values: Tensor) -> Tensor:
    """Write all pairs into the state, then return its output [B,N,1,V] for every key [B,N,1,K] as a query."""
    if isinstance(layer, SoftmaxAttention):
        kept = min(layer.window or keys.shape[1], keys.shape[1])
        return flash_attention(keys, keys[:, -kept:], values[:, -kept:], causal=False)
    if isinstance(layer, ProjectedRecurrentMixer):
        gates = layer.gates(torch.randn(*keys.shape[:2], layer.hidden_size))
        _, state = layer.attend(keys, keys, values, *gates, output_final_state=True, **layer.operator_options)
        assert state is not None
        return keys @ state  # [B,N,1,K] @ [B,1,K,V]
    assert isinstance(layer, LinearAttention)
    keys = FEATURE_MAPS[layer.feature_map](keys)
    attend = partial(layer.attend, normalize=layer.normalize, output_final_state=True)
    _, state = attend(keys, keys, values)
    assert state is not None
    # Query each key in its own row. The operator also writes a pair: its value is zero, so it only scales the output.
    rows = keys.flatten(0, 1)[:, None]
    parts = (state.kv, state.k_sum) if isinstance(state, NormalizedState) else (state,)
    parts = [x.repeat_interleave(keys.shape[1], 0) for x in parts]
    o, _ = attend(
        rows,
        rows,
        values.new_zeros(len(rows), 1, 1, layer.value_dim),
        initial_state=NormalizedState(*parts) if layer.normalize else parts[0],
    )
    return o.unflatten(0, keys.shape[:2])[:, :, 0]
