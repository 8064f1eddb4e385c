"""What the attention function has to know of a batch beyond the shapes of queries and keys: masks as small as a row.

Causality and window are arguments of the attention function. Left to say is which keys are real, which of them belong
to the queries, and which sequences are packed. A mask is [B,1,1,keys] and never [B,1,queries,keys]; transformers hands
masks of four dimensions on as they are, also those that ``generate`` makes ahead of a forward pass.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import and_masks, bidirectional_mask_function, causal_mask_function

from ..unpadding import Packing

KEY, NEW = 1, 2  # flags of a slot: its key may be seen; it belongs to a query
CONJUNCTION = and_masks(causal_mask_function).__code__  # of windows and packed sequences


def create_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask of one forward pass, under the arguments of transformers' ``AttentionMaskInterface``.

    Args:
        q_length, q_offset: number of queries and position of the first, a tensor for static caches.
        kv_length, kv_offset: number of key slots and position of the first.
        mask_function: which key a query may see, as transformers composes it.
        attention_mask: boolean [B, positions so far], False for padding, which may lie anywhere.
        local_size: window or chunk size that is part of ``mask_function``.
        allow_is_causal_skip: whether None may be returned; a compiled step is to get a mask every time.
        use_vmap: ``mask_function`` has parts that came from outside transformers.

    Returns:
        None where the last key is that of the last query and all are real. Packed sequences, by positions that start
        again: int32 [B,1,1,T], the number of each token's sequence. Else uint8 [B,1,1,kv_length] of the flags KEY and
        NEW; without NEW in bidirectional attention, where queries may be of another sequence than keys. Where a window
        hides keys the mask is there twice, [B,1,2,..], or [B,1,2,0] instead of None: a layer that has not been told of
        its window (transformers has such models) is then found out.

    Raises:
        ValueError: a pattern other than causal or bidirectional with or without a window; a mask not [B,T].
    """
    _check_pattern(mask_function, use_vmap)
    _check_model(config)
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and local_size == chunk and kv_length + kv_offset > chunk:
        raise ValueError(f"attention_chunk_size: expected at least {kv_length + kv_offset} (all keys), got {chunk}")
    real = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask: expected shape [B, T], got {list(attention_mask.shape)}")
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        real = F.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length].bool()
        if not torch.compiler.is_compiling() and bool(real.all()):
            real = None
    past = q_offset - kv_offset
    aligned = isinstance(past, int) and past + q_length == kv_length
    if mask_function is bidirectional_mask_function:
        rows = None if real is None else (real * KEY).to(torch.uint8)
    elif aligned and past == 0 and attention_mask is None and mask_function is not causal_mask_function:
        rows = _sequences(mask_function, batch_size, q_length, device)
    elif aligned and real is None and allow_is_causal_skip:
        rows = None
    else:
        slot = torch.arange(kv_length, device=device)
        written = slot < past + q_length
        keys = written if real is None else written & real
        rows = (keys * KEY + (written & (slot >= past)) * NEW).to(torch.uint8)
    copies = 1 if local_size is None or local_size >= kv_length else 2
    if rows is None:
        return None if copies == 1 else torch.empty(batch_size, 1, 2, 0, dtype=torch.uint8, device=device)
    # Contiguous: a compiled step is to find the same strides every time.
    return rows.expand(batch_size, -1)[:, None, None].expand(-1, -1, copies, -1).contiguous()


def _check_model(config: Any) -> None:
    """transformers asks also for models whose layers have attention of their own, which would apply this as a mask."""
    name = type(config).__module__
    modeling = sys.modules.get(name.replace(".configuration_", ".modeling_"))
    if name.startswith("transformers.models.") and modeling and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"attn_implementation: expected 'eager' for {type(config).__name__}, whose layers call no other attention, "
            "got 'hybridattn'"
        )


def _check_pattern(mask_function: Callable[..., Any], use_vmap: bool) -> None:
    known = mask_function in (causal_mask_function, bidirectional_mask_function)
    if use_vmap or not (known or getattr(mask_function, "__code__", None) is CONJUNCTION):
        raise ValueError(
            "mask_function: expected a causal or bidirectional mask, with or without a window, got another pattern "
            "(blocks, prefixes or a function of the caller's), which attn_implementation='hybridattn' cannot apply"
        )


def _sequences(mask_function: Callable[..., Any], batch: int, tokens: int, device: Any) -> Tensor | None:
    """Numbers of packed sequences: a token that may not see the one before it is the first of another."""
    row, t = torch.arange(batch, device=device)[:, None], torch.arange(1, tokens, device=device)[None]
    follows = mask_function(row, torch.zeros_like(row), t, t - 1).expand(batch, tokens - 1)
    if not torch.compiler.is_compiling() and bool(follows.all()):
        return None
    return F.pad((~follows).cumsum(1), (1, 0)).to(torch.int32)


class Layout:
    """What a mask of flags says of so many queries. What is read on the host is read once for all layers.

    Attributes:
        keys: boolean [B,slots]: the key may be seen.
        first: slot of the first query, a scalar tensor; 0 if the mask has no NEW.
    """

    def __init__(self, mask: Tensor, queries: int):
        flags = mask[:, 0, 0]
        self.keys = flags & KEY > 0
        self.first = (flags[0] & NEW > 0).int().argmax()
        self._number = queries
        self._done: dict[str, Any] = {}  # functools.cached_property takes a lock, which torch.compile cannot trace

    @staticmethod
    def of(mask: Tensor, queries: int) -> "Layout":
        if torch.compiler.is_compiling():
            return Layout(mask, queries)
        if mask not in _layouts:
            _layouts[mask] = {}
        of_mask = _layouts[mask]
        if queries not in of_mask:
            of_mask[queries] = Layout(mask, queries)
        return of_mask[queries]

    def queries(self) -> Tensor:
        """Slots [T] of the queries, where they are of the same sequence as the keys."""
        return self.first + torch.arange(self._number, device=self.keys.device)

    def has_holes(self) -> bool:
        """Whether padding lies between real tokens; True in a graph being traced, which cannot know."""
        if torch.compiler.is_compiling():
            return True
        if "holes" not in self._done:
            starts = self.keys.clone()
            starts[:, 1:] &= ~self.keys[:, :-1]
            self._done["holes"] = bool((starts.sum(1) > 1).any())
        return self._done["holes"]

    def packed_keys(self) -> Packing:
        return self._packed("keys", lambda: self.keys)

    def packed_queries(self) -> Packing:
        """The real tokens among the queries, where they are of the same sequence as the keys."""
        return self._packed("queries", lambda: self.keys[:, self.queries()])

    def all_queries(self) -> Packing:
        """All queries: they may be of another sequence than the keys, and the mask says nothing of them."""
        return self._packed("all", lambda: self.keys.new_ones(len(self.keys), self._number))

    def _packed(self, name: str, real: Callable[[], Tensor]) -> Packing:
        if name not in self._done:
            self._done[name] = Packing.of(real())
        return self._done[name]


_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of masks in use: every layer is handed the same tensor
