"""The attention function that transformers calls in every layer; it selects the operator for the layer's arguments."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.flash_attention import MOST_NEW_TOKENS, blocked, flash_attention, flash_decode
from ...kernels.flash_attention.options import Options
from ...layers.parallel.context import refuse_if_sharded
from .masks import Layout

# Arguments for biases of the scores, paged caches, keys selected by an indexer, and sinks per token
UNSUPPORTED = ("position_bias", "cache", "block_table", "indices", "block_indices", "sinks")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the softmax attention of one layer, with the arguments of transformers' ``AttentionInterface``.

    Padding tokens are removed by packing (Law 3 of DESIGN.md); a decode step reads the cache in place. Windows count
    positions, including padding inside a row, as transformers' own masks do. While torch.compile traces, no shape
    depends on the padding, and packed sequences need ``cu_seq_lens_q``: a position that restarts raises an error there.

    Args:
        module: the layer; its ``is_causal`` is used if the argument ``is_causal`` is None, and one of them must be set.
        query: [B,Hq,T,D].
        key, value: [B,H,S,D] and [B,H,S,V], Hq a multiple of H; S > T with a cache or in cross-attention.
        attention_mask: mask returned by ``create_mask``.
        scaling: factor of the scores, D^-0.5 by default.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; if not causal, see ``_reach``.
        position_ids: [B,T]; a position that restarts begins a packed sequence. Ignored if the cache holds earlier keys.
        kwargs: ``softcap``; ``s_aux`` [Hq], sinks; ``cu_seq_lens_q`` and ``cu_seq_lens_k``, offsets of packed sequences
            (B = 1). Arguments for other attention implementations are ignored.

    Returns:
        o [B,T,Hq,V], and None for the weights, which are never computed. Outputs of padding tokens are undefined.

    Raises:
        ValueError: dropout, a bias of the scores, a paged cache, a mask that is not from ``create_mask``, a mask with a
            window that the layer does not pass, or an active ``sequence_parallel`` context.
    """
    refuse_if_sharded(
        "attn_implementation='hybridattn': expected no context (only this package's models support one), got a call"
    )
    if dropout:
        raise ValueError(f"dropout: expected 0 with attn_implementation='hybridattn', got {dropout}")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with attn_implementation='hybridattn', got a value")
    if sliding_window is None and attention_mask is not None and attention_mask.shape[2:3] == (2,):
        sliding_window = getattr(module, "sliding_window", None)  # Qwen2-MoE has it and does not pass it on
    mask = _check_mask(attention_mask, key.shape[2], sliding_window)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if is_causal is None and not hasattr(module, "is_causal"):
        raise ValueError(
            f"is_causal: expected an argument or an attribute of the layer, got neither for {type(module).__name__}"
        )
    causal = bool(module.is_causal if is_causal is None else is_causal)
    options: dict[str, Any] = {"scale": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    if sliding_window is not None and (reach := _reach(module, sliding_window, causal)) < k.shape[1] - 1:
        options["window"] = (reach, 0 if causal else reach)
    layout = None
    if mask is not None and mask.dtype == torch.uint8:
        layout = Layout.of(mask, q.shape[1])
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is not None:
        if layout is not None:
            raise ValueError("attention_mask: expected no padding and no static cache with cu_seq_lens_q, got one")
        if causal and q.shape[1] != k.shape[1]:
            raise ValueError(
                f"cu_seq_lens_q: expected None with cached keys, got offsets with {q.shape[1]} queries and "
                f"{k.shape[1]} keys"
            )
        ends = kwargs.get("cu_seq_lens_k")
        o = flash_attention(q, k, v, causal=causal, cu_seqlens_q=offsets, cu_seqlens_k=ends, **options)
    elif layout is not None:
        o = _masked(q, k, v, layout, causal, options)
    elif (offsets := _packed_offsets(mask, position_ids, q, k)) is not None:
        flat = (x.flatten(0, 1)[None] for x in (q, k, v))
        o = flash_attention(*flat, causal=causal, cu_seqlens_q=offsets, **options).view(*q.shape[:3], -1)
    elif _is_step(q, k, causal):
        o = flash_decode(q, k, v, cache_lengths=torch.full((len(q),), k.shape[1], device=q.device), **options)
    else:
        o = flash_attention(q, k, v, causal=causal, **options)
    return o.contiguous(), None


def _check_mask(mask: Tensor | None, keys: int, sliding_window: int | None) -> Tensor | None:
    """Return the mask, or None if it only signals that the layer has a window."""
    if mask is None:
        return None
    known = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] <= 2 and mask.dtype in (torch.uint8, torch.int32)
    if not known:
        raise ValueError(
            "attention_mask: expected [B, T] with zeros for padding with attn_implementation='hybridattn', "
            f"got {mask.dtype} {list(mask.shape)}; other patterns need 'eager' or 'sdpa'"
        )
    if mask.shape[2] == 2 and sliding_window is None:
        raise ValueError(
            "sliding_window: expected the window of the mask, got None: layers of this model do not pass their window; "
            "use 'eager' or 'sdpa' attention, which read it from the mask"
        )
    if mask.shape[2:] == (2, 0):
        return None
    if mask.shape[3] != keys:
        raise ValueError(f"attention_mask: expected one entry for each of {keys} keys, got {mask.shape[3]}")
    return mask


def _reach(module: nn.Module, sliding_window: int, causal: bool) -> int:
    """Return how many tokens before itself (and, if not causal, after itself) a token sees.

    In causal attention ``sliding_window`` counts the token itself. In bidirectional attention some models count it and
    others do not, while transformers' masks always reach ``config.sliding_window`` tokens to each side.
    """
    if causal:
        return sliding_window - 1
    return getattr(getattr(module, "config", None), "sliding_window", None) or sliding_window - 1


def _is_step(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether this is a decode step: at most MOST_NEW_TOKENS queries after cached keys, without gradients."""
    return causal and q.shape[1] <= MOST_NEW_TOKENS and q.shape[1] < k.shape[1] and not torch.is_grad_enabled()


def _packed_offsets(mask: Tensor | None, position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the offsets of all packed sequences, with the rows concatenated; None if every row is one sequence."""
    if mask is not None:
        sequences = mask[:, 0, 0]
    elif position_ids is not None and position_ids.shape == q.shape[:2] and 1 < q.shape[1] == k.shape[1]:
        # With a cache object, transformers does not search position_ids for packed sequences.
        sequences = F.pad((position_ids.diff(dim=1) <= 0).cumsum(1), (1, 0))
    else:
        return None
    one_each = (sequences[:, -1] == 0).all()
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(
            one_each, "position_ids: expected cu_seq_lens_q with positions that restart, got None"
        )
        return None
    if bool(one_each):
        return None
    first = F.pad(sequences.diff(dim=1) != 0, (1, 0), value=True).flatten()
    return F.pad(first.nonzero().squeeze(1), (0, 1), value=first.numel())


def _masked(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool, options: dict[str, Any]) -> Tensor:
    """Compute attention with padding, or with a static cache some of whose slots are still empty."""
    step, window = _is_step(q, k, causal), options.get("window")
    if step and not layout.has_holes():
        lengths = (layout.first + q.shape[1]).expand(len(q))
        return flash_decode(q, k, v, cache_lengths=lengths, start_positions=layout.keys.int().argmax(1), **options)
    if (step or window) and layout.has_holes():  # packing would reduce distances, and the window would reach too far
        return _by_position(q, k, v, layout, **options)
    # In bidirectional attention the mask covers only the keys, possibly of another sequence: compute every query.
    packed_q = layout.packed_queries() if causal or window else layout.all_queries()
    packed_k = layout.packed_keys()
    o = flash_attention(
        packed_q.pack(q),
        packed_k.pack(k),
        packed_k.pack(v),
        causal=causal,
        cu_seqlens_q=packed_q.cu_seqlens,
        cu_seqlens_k=packed_k.cu_seqlens,
        **options,
    )
    return packed_q.unpack(o.flatten(2), q).unflatten(2, o.shape[2:])


def _by_position(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Compute causal or windowed attention by position, without packing; masked keys get a position out of reach."""
    left, right = window or (None, 0)
    options = Options(q.shape[3] ** -0.5 if scale is None else scale, left, right, None, sinks, softcap)
    slots = torch.arange(k.shape[1], device=q.device)
    s = torch.where(layout.keys, slots, blocked.NOWHERE)
    return blocked.forward(q, k, v, layout.queries().expand(len(q), -1), s, *options.flat(), None, None)[0]
