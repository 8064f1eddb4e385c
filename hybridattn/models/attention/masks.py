"""The mask function for ``attn_implementation="hybridattn"``: padding and packed sequences with one entry per key.

Causality and window are arguments of the attention function. The mask holds which keys are not padding, which keys
belong to the queries, and which sequences are packed. Its shape is [B,1,1,keys], never [B,1,queries,keys]. transformers
passes masks of four dimensions on unchanged, including the masks that ``generate`` creates before a forward pass.
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

KEY, NEW = 1, 2  # flags of a key slot: KEY, queries may attend to it; NEW, it belongs to a query of this pass
CONJUNCTION = and_masks(causal_mask_function).__code__  # transformers composes windows and packed sequences with it


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
    """Return the mask of one forward pass, with the arguments of transformers' ``AttentionMaskInterface``.

    Args:
        q_length, q_offset: number of queries and position of the first, a tensor for static caches.
        kv_length, kv_offset: number of key slots and position of the first.
        mask_function: predicate of transformers: whether a query attends to a key.
        attention_mask: boolean [B, positions so far], False for padding, at any position.
        local_size: window or chunk size that is part of ``mask_function``.
        allow_is_causal_skip: whether None may be returned; False for compiled steps, which need a mask every time.
        use_vmap: whether ``mask_function`` has parts from outside transformers.

    Returns:
        One of three values:

        - None if the last key belongs to the last query and no key is padding.
        - int32 [B,1,1,T] if position ids show packed sequences: the index of each token's sequence.
        - uint8 [B,1,1,kv_length] otherwise, with the flags KEY and NEW. Bidirectional attention has no NEW, since its
          queries may belong to another sequence than its keys.

        If a window hides keys, the mask is repeated, [B,1,2,..], or is [B,1,2,0] instead of None. The attention
        function can then detect layers that do not pass their window, which some models of transformers have.

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
    # Contiguous, so that a compiled step gets the same strides every time and is not compiled again.
    return rows.expand(batch_size, -1)[:, None, None].expand(-1, -1, copies, -1).contiguous()


def _check_model(config: Any) -> None:
    """Raise for models whose layers compute attention themselves: they would misread this mask."""
    name = type(config).__module__
    modeling = sys.modules.get(name.replace(".configuration_", ".modeling_"))
    if name.startswith("transformers.models.") and modeling and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"attn_implementation: expected 'eager' for {type(config).__name__}, whose layers cannot call another "
            "attention function, got 'hybridattn'"
        )


def _check_pattern(mask_function: Callable[..., Any], use_vmap: bool) -> None:
    known = mask_function in (causal_mask_function, bidirectional_mask_function)
    if use_vmap or not (known or getattr(mask_function, "__code__", None) is CONJUNCTION):
        raise ValueError(
            "mask_function: expected a causal or bidirectional mask, with or without a window, with "
            "attn_implementation='hybridattn', got another pattern (blocks, prefixes or a custom function)"
        )


def _sequences(mask_function: Callable[..., Any], batch: int, tokens: int, device: Any) -> Tensor | None:
    """Return the index of each token's packed sequence, or None if every row is one sequence.

    A token that may not attend to the token before it is the first of a new sequence.
    """
    row, t = torch.arange(batch, device=device)[:, None], torch.arange(1, tokens, device=device)[None]
    follows = mask_function(row, torch.zeros_like(row), t, t - 1).expand(batch, tokens - 1)
    if not torch.compiler.is_compiling() and bool(follows.all()):
        return None
    return F.pad((~follows).cumsum(1), (1, 0)).to(torch.int32)


class Layout:
    """Positions of keys, queries and padding, decoded from a mask of flags and a number of queries.

    Values that the host reads (they synchronise a GPU) are read once and reused by all layers.

    Attributes:
        keys: boolean [B,slots]: queries may attend to the key.
        first: slot of the first query, a scalar tensor; 0 if the mask has no NEW flag.
    """

    def __init__(self, mask: Tensor, queries: int):
        flags = mask[:, 0, 0]
        self.keys = flags & KEY > 0
        self.first = (flags[0] & NEW > 0).int().argmax()
        self._number = queries
        self._cached: dict[str, Any] = {}  # functools.cached_property takes a lock, which torch.compile cannot trace

    @staticmethod
    def of(mask: Tensor, queries: int) -> "Layout":
        """Return the layout of this mask and number of queries; layers that share the mask tensor share the layout."""
        if torch.compiler.is_compiling():
            return Layout(mask, queries)
        if mask not in _layouts:
            _layouts[mask] = {}
        of_mask = _layouts[mask]
        if queries not in of_mask:
            of_mask[queries] = Layout(mask, queries)
        return of_mask[queries]

    def queries(self) -> Tensor:
        """Return the slots [T] of the queries; only valid if queries and keys belong to the same sequence."""
        return self.first + torch.arange(self._number, device=self.keys.device)

    def has_holes(self) -> bool:
        """Whether any row has padding between tokens; True while torch.compile traces, where values are unknown."""
        if torch.compiler.is_compiling():
            return True
        if "holes" not in self._cached:
            starts = self.keys.clone()
            starts[:, 1:] &= ~self.keys[:, :-1]
            self._cached["holes"] = bool((starts.sum(1) > 1).any())
        return self._cached["holes"]

    def packed_keys(self) -> Packing:
        """Return the packing of the keys that are not masked."""
        return self._packed("keys", lambda: self.keys)

    def packed_queries(self) -> Packing:
        """Return the packing of the queries that are not padding, if they belong to the same sequence as the keys."""
        return self._packed("queries", lambda: self.keys[:, self.queries()])

    def all_queries(self) -> Packing:
        """Return the packing of all queries, for queries of another sequence, which the mask does not cover."""
        return self._packed("all", lambda: self.keys.new_ones(len(self.keys), self._number))

    def _packed(self, name: str, real: Callable[[], Tensor]) -> Packing:
        if name not in self._cached:
            self._cached[name] = Packing.of(real())
        return self._cached[name]


# By mask and number of queries. Keyed by the mask's identity, since every layer receives the same tensor.
_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()
