"""The torch ops of chunked linear attention in Triton, forward and backward: allocation, launches, autograd.

B batch, T time, N sequences; q [B,T,Hq,K], k [B,T,H,K], v [B,T,Hv,V], g [B,T,Hg,K], [B,T,Hg,1] or None, state
[N,Hs,K,V]. If a tensor has fewer heads than o, neighbouring heads of o share a head of it. The kernels read the shared
head in place; nothing is repeated in memory.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# pyright takes a launch for a call of the Python function.

from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...runtime.architectures import architecture, launching, warn_of_launch
from ...runtime.opaque_ops import opaque_op
from .. import features
from .backward import sweep_keys
from .chunk_states import scan_states, states
from .forward import sweep_values
from .hot_channels import repair_keys, repair_values
from .launch import ChunkLaunch, chunk_launch, operand_name, segments, tile_columns
from .taylor import sweep_features

SCAN = 1024  # elements of a state per program of ``scan_states``
FAR = 1 << 24  # token stride, in elements, below which offsets within a tile of 64 tokens fit 32 bits


@opaque_op("hybridattn::linear_attention_triton")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: bool,
    wide: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute outputs [B,T,max(Hq,Hv),V] in v's dtype, fp32 if ``wide``, and final states, fp32 [N,max(H,Hv),K,V].

    With ``taylor`` the weights are 1 + z + z^2/2 with z = scale * q.k, and the state has P rows, one per feature,
    instead of K.
    """
    o, last = _outputs(q, k, v, taylor, wide, cu_seqlens)
    if not o.numel() or not last.numel():
        return o.zero_(), last.zero_() if state is None else last.copy_(state)
    q, k, v = map(_dense, (q, k, v))
    g, cu_seqlens = None if g is None else _dense(g), None if cu_seqlens is None else cu_seqlens.contiguous()
    hot = _flags(o, k, g, cu_seqlens)
    first = None if state is None else state.contiguous()
    operands, parts = operand_name(q, k, v), _segments(o, cu_seqlens)
    phi = taylor_tables(k.shape[3], scale, k.device) if taylor else None
    ends = last
    if parts > 1:
        first, last = _segment_states(k, v, g, first, last.shape[1], phi, cu_seqlens, 1.0, operands, parts, False)
        ends = None
    _sweep_values(q, k, v, g, o, first, ends, hot, phi, cu_seqlens, scale, operands, parts, reverse=False)
    if hot is not None:
        _repair_values(q, k, v, g, o, hot, cu_seqlens, scale, operands, reverse=False)
    return o, last


@forward.register_fake
def _(q, k, v, g, scale, taylor, wide, state, cu_seqlens):
    return _outputs(q, k, v, taylor, wide, cu_seqlens)


@opaque_op("hybridattn::linear_attention_triton_backward")
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    taylor: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v, g (empty without gates) and the initial state.

    Args:
        q, k, v, g, scale, taylor, state, cu_seqlens: as in ``forward``.
        do, dlast: gradients of outputs and final states.
    """
    given = (q, k, v, q.new_empty(0) if g is None else g)
    if not do.numel() or not dlast.numel():
        zeros = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given]
        return zeros[0], zeros[1], zeros[2], zeros[3], dlast.clone(memory_format=torch.contiguous_format)
    q, k, v, do = map(_dense, (q, k, v, do))
    g, cu_seqlens = None if g is None else _dense(g), None if cu_seqlens is None else cu_seqlens.contiguous()
    dlast, first = dlast.contiguous(), None if state is None else state.contiguous()
    hot, operands, parts = _flags(do, k, g, cu_seqlens), operand_name(q, k, v), _segments(do, cu_seqlens)

    phi = taylor_tables(k.shape[3], scale, k.device) if taylor else None

    ends = dlast
    if parts > 1:
        first, _ = _segment_states(k, v, g, first, dlast.shape[1], phi, cu_seqlens, 1.0, operands, parts, False)
        ends, _ = _segment_states(q, do, g, dlast, do.shape[2], phi, cu_seqlens, scale, operands, parts, True)
    h = _chunk_states(k, v, g, do, first, hot, phi, cu_seqlens, operands, parts)
    dq, dk, dg, dfirst = _key_gradients(q, k, v, g, do, h, ends, hot, phi, cu_seqlens, scale, operands, parts)
    dv = _gradients_of(v, do, cu_seqlens)
    _sweep_values(k, q, do, g, dv, ends, None, hot, phi, cu_seqlens, scale, operands, parts, reverse=True)
    if hot is not None:
        _repair_keys(q, k, v, g, do, dq, dk, dg, hot, cu_seqlens, scale, operands)
        _repair_values(q, k, do, g, dv, hot, cu_seqlens, scale, operands, reverse=True)
    grads = [_summed(y, x) for y, x in zip((dq, dk, dv, dg), given, strict=True)]
    dfirst = dfirst[::parts].unflatten(1, (dlast.shape[1], -1)).sum(2)
    return grads[0], grads[1], grads[2], grads[3], dfirst


@backward.register_fake
def _(q, k, v, g, scale, taylor, state, cu_seqlens, do, dlast):
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, q.new_empty(0) if g is None else g)
    ]
    return (*grads, dlast.new_empty(dlast.shape))


def _save(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, ctx.taylor, _, state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, state, cu_seqlens)


def _backward(ctx, do, dlast):
    q, k, v, g, state, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, dg, dfirst = backward(q, k, v, g, ctx.scale, ctx.taylor, state, cu_seqlens, do, dlast)
    return dq, dk, dv, None if g is None else dg, None, None, None, None if state is None else dfirst, None


forward.register_autograd(_backward, setup_context=_save)


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, taylor: bool, wide: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (*v.shape[:2], max(q.shape[2], v.shape[2]), v.shape[3])
    new = v.new_empty if cu_seqlens is None else v.new_zeros  # no program writes tokens past the last offset
    o = new(shape, dtype=torch.float32 if wide else v.dtype)
    rows = features.count(k.shape[3]) if taylor else k.shape[3]
    return o, v.new_empty(sequences, max(k.shape[2], v.shape[2]), rows, v.shape[3], dtype=torch.float32)


def _flags(o: Tensor, k: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Allocate the flags of hot channels, int32 [slots,heads,K]; None unless gates are per channel."""
    if g is None or g.shape[3] == 1:
        return None
    new = torch.empty if cu_seqlens is None else torch.zeros  # some slots of a packed row have no chunk
    return new(_slots(o, cu_seqlens)[0], o.shape[2], k.shape[3], dtype=torch.int32, device=o.device)


def _slots(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Return the number of chunk slots of all sequences (see ``find_sequence``) and the number of sequences."""
    if cu_seqlens is None:
        return x.shape[0] * -(-x.shape[1] // 64), x.shape[0]
    sequences = len(cu_seqlens) - 1
    return x.shape[1] // 64 + sequences, sequences


def _segments(y: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many segments every sequence is split into."""
    sequences, (_, tokens, heads, value_dim) = _slots(y, cu_seqlens)[1], y.shape
    columns = tile_columns(value_dim)
    return segments(
        sequences * heads * -(-value_dim // columns), -(-tokens * len(y) // sequences) // 64, _processors(y.device)
    )


@cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _gradients_of(x: Tensor, y: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate the gradient of x for every head of y, in fp32 if several heads of y share a head of x."""
    new = x.new_empty if cu_seqlens is None else x.new_zeros  # no program writes tokens past the last offset
    dtype = dtype or (torch.float32 if x.shape[2] < y.shape[2] else x.dtype)
    return new(*x.shape[:2], y.shape[2], x.shape[3], dtype=dtype)


def _summed(grads: Tensor, x: Tensor) -> Tensor:
    """Sum ``grads`` over the heads that share a head of x, and cast the sums to x's dtype."""
    if grads.shape != x.shape:
        grads = grads.unflatten(2, (x.shape[2], -1)).sum(3)
    return grads.to(x.dtype)


# ------------------------------------------------------------------------------------------------------------- launches
def _chunk_states(k, v, g, do, first, hot, phi, cu_seqlens, operands, parts) -> Tensor:
    """Compute the states before all chunks, [slots,V,heads,K]."""
    heads, slots = do.shape[2], _slots(do, cu_seqlens)[0]
    dtype = torch.bfloat16 if operands == "bf16" else torch.float32
    rows = _rows(k, phi)
    # Padded: TMA needs strides of a multiple of 16 bytes.
    h = k.new_empty(slots, v.shape[3], heads, -(-rows // 8) * 8, dtype=dtype)[..., :rows]
    _states(k, v, g, h, first, None, None, hot, phi, cu_seqlens, 1.0, heads, operands, parts, reverse=False)
    return h


def _segment_states(w, u, g, first, heads, phi, cu_seqlens, scale, operands, parts, reverse) -> tuple[Tensor, Tensor]:
    """Compute the states before all segments, fp32 [sequences * parts,heads,K,V], and after each sequence."""
    sequences, key_dim, value_dim = _slots(u, cu_seqlens)[1], _rows(w, phi), u.shape[3]
    local = w.new_empty(sequences * parts, heads, key_dim, value_dim, dtype=torch.float32)
    lost = w.new_zeros(sequences * parts, heads, key_dim, dtype=torch.float32)
    _states(w, u, g, None, None, local, lost, None, phi, cu_seqlens, scale, heads, operands, parts, reverse=reverse)
    starts, last = torch.empty_like(local), local.new_empty(sequences, *local.shape[1:])
    with launching("linear_attention_scan_states", w):
        scan_states[(sequences * heads * triton.cdiv(key_dim * value_dim, SCAN),)](
            local,
            lost,
            first,
            starts,
            last,
            parts,
            K=key_dim,
            V=value_dim,
            HEADS=heads,
            STATE_SHARE=1 if first is None else heads // first.shape[1],
            REVERSE=reverse,
            BLOCK=SCAN,
        )
    return starts, last


def _states(w, u, g, h, first, last, lost, hot, phi, cu_seqlens, scale, heads, operands, parts, *, reverse) -> None:
    key_dim, value_dim = _rows(w, phi), u.shape[3]
    launch = _launch("states", w.device, key_dim, value_dim, operands)
    blocks = triton.cdiv(key_dim, launch.block_k) * triton.cdiv(value_dim, 64)
    tma = _describable(launch, cu_seqlens, w, u, h, _channel(g))
    with launching(launch.name, w):
        states[(_slots(u, cu_seqlens)[1] * parts * heads * blocks,)](
            _tile(w, _columns(launch, w, phi), tma),
            _tile(u, 64, tma),
            _gates(g, launch.block_k, tma),
            None if h is None else _tile(h, launch.block_k, tma),
            first,
            last,
            lost,
            hot,
            phi,
            cu_seqlens,
            float(scale),
            u.shape[1],
            parts,
            **_constexprs(launch, heads, key_dim, value_dim, g, operands),
            **_dims(w),
            **_shares(heads, W=w, U=u, G=g),
            STATE_SHARE=1 if first is None else heads // first.shape[1],
            REVERSE=reverse,
            TMA=tma,
        )


def _key_gradients(q, k, v, g, do, h, dlast, hot, phi, cu_seqlens, scale, operands, parts) -> tuple[Tensor, ...]:
    """Compute the gradients of q, k, g (empty without gates) and the initial state.

    If V exceeds the values of one launch, the gradients are sums over several launches, each with a group of values.
    """
    most = min(v.shape[3], 128) if phi else v.shape[3]  # features need the registers that more values would take
    launch = _launch("sweep_keys", k.device, _rows(k, phi), most, operands)
    groups = zip(*(x.split(launch.most, dim) for x, dim in ((v, 3), (do, 3), (h, 1), (dlast, 3))), strict=True)
    dtype = torch.float32 if launch.most < v.shape[3] else None
    sums: list[Tensor] = []
    dfirst: list[Tensor] = []
    for values in groups:
        if phi is None:
            *grads, columns = _sweep_keys(launch, q, k, g, *values, hot, cu_seqlens, scale, operands, parts, dtype)
        else:
            *grads, columns = _sweep_features(launch, q, k, *values, phi, cu_seqlens, scale, operands, parts)
        sums = [x.add_(y) for x, y in zip(sums, grads, strict=True)] if sums else grads
        dfirst.append(columns)
    return (*sums, torch.cat(dfirst, 3))


def _sweep_keys(launch, q, k, g, v, do, h, dlast, hot, cu_seqlens, scale, operands, parts, dtype) -> list[Tensor]:
    (_, tokens, heads, value_dim), key_dim, gate = do.shape, k.shape[3], _gate(g)
    blocks = triton.cdiv(key_dim, launch.block_k)
    dq, dk = (_gradients_of(x, do, cu_seqlens, dtype) for x in (q, k))
    dfirst = dlast.new_empty(dlast.shape[0], heads, *dlast.shape[2:])
    if g is None:
        dg = None
    elif gate == "head":  # every block of keys has a part of the sum over channels
        dg = q.new_zeros(*do.shape[:3], blocks, dtype=torch.float32)
    else:
        dg = _gradients_of(g, do, cu_seqlens, dtype)
    tma = _describable(launch, cu_seqlens, q, k, v, do, h, dq, dk, _channel(g))
    with launching(launch.name, k):
        sweep_keys[(dfirst.shape[0] * heads * blocks,)](
            *(_tile(x, launch.block_k, tma) for x in (q, k)),
            _tile(v, 64, tma),
            _gates(g, launch.block_k, tma),
            _tile(do, 64, tma),
            *(_tile(x, launch.block_k, tma) for x in (h, dq, dk)),
            _tile(dg, launch.block_k, tma) if gate == "channel" else _gates(dg, blocks, False),
            dlast.contiguous(),
            dfirst,
            hot,
            cu_seqlens,
            float(scale),
            tokens,
            parts,
            **_constexprs(launch, heads, key_dim, value_dim, g, operands),
            **_shares(heads, Q=q, K=k, V=v, G=g),
            STATE_SHARE=heads // dlast.shape[1],
            TMA=tma,
        )
    if dg is None:
        dg = q.new_empty(0)
    return [dq, dk, dg.sum(3, keepdim=True) if gate == "head" else dg, dfirst]


def _sweep_features(launch, q, k, v, do, h, dlast, phi, cu_seqlens, scale, operands, parts) -> list[Tensor]:
    (batch, tokens, heads, value_dim), (dim, key_dim) = do.shape, (k.shape[3], h.shape[3])
    blocks = triton.cdiv(key_dim, launch.block_k)
    new = q.new_empty if cu_seqlens is None else q.new_zeros
    dq, dk = (new(batch, tokens, heads * blocks, dim, dtype=torch.float32) for _ in "qk")
    dfirst = dlast.new_empty(dlast.shape[0], heads, *dlast.shape[2:])
    tma, columns = _describable(launch, cu_seqlens, q, k, v, do, h, dq, dk), tile_columns(dim)
    constexprs = _constexprs(launch, heads, key_dim, value_dim, None, operands)
    with launching(launch.name, k):
        sweep_features[(dfirst.shape[0] * heads * blocks,)](
            *(_tile(x, columns, tma) for x in (q, k)),
            *(_tile(x, 64, tma) for x in (v, do)),
            _tile(h, launch.block_k, tma),
            *(_tile(x, columns, tma) for x in (dq, dk)),
            dlast.contiguous(),
            dfirst,
            phi,
            cu_seqlens,
            float(scale),
            tokens,
            parts,
            **{name: value for name, value in constexprs.items() if name not in ("GATE", "TERMS")},
            **_dims(k),
            **_shares(heads, Q=q, K=k, V=v),
            STATE_SHARE=heads // dlast.shape[1],
            TMA=tma,
        )
    return [*(x.unflatten(2, (heads, blocks)).sum(3) for x in (dq, dk)), q.new_empty(0), dfirst]


def _sweep_values(a, w, u, g, y, first, last, hot, phi, cu_seqlens, scale, operands, parts, *, reverse) -> None:
    (_, tokens, heads, value_dim), key_dim = y.shape, _rows(a, phi)
    launch = _launch("sweep_values", a.device, key_dim, value_dim, operands)
    blocks = triton.cdiv(value_dim, launch.block_v)
    tma = _describable(launch, cu_seqlens, a, w, u, y, _channel(g))
    with launching(launch.name, y):
        sweep_values[(_slots(y, cu_seqlens)[1] * parts * heads * blocks,)](
            *(_tile(x, _columns(launch, x, phi), tma) for x in (a, w)),
            _tile(u, launch.block_v, tma),
            _gates(g, launch.block_k, tma),
            _tile(y, launch.block_v, tma),
            first,
            last,
            hot,
            phi,
            cu_seqlens,
            float(scale),
            tokens,
            parts,
            **_constexprs(launch, heads, key_dim, value_dim, g, operands),
            **_dims(a),
            **_shares(heads, A=a, W=w, U=u, G=g),
            STATE_SHARE=heads // (first if last is None else last).shape[1],
            REVERSE=reverse,
            TMA=tma,
            BLOCK_V=launch.block_v,
        )


def _repair_values(q, k, u, g, y, hot, cu_seqlens, scale, operands, *, reverse) -> None:
    shares = _shares(y.shape[2], Q=q, K=k, U=u, G=g)
    _repair(repair_values, (q, k, u, g, y), hot, cu_seqlens, scale, operands, y, {**shares, "REVERSE": reverse})


def _repair_keys(q, k, v, g, do, dq, dk, dg, hot, cu_seqlens, scale, operands) -> None:
    shares = _shares(do.shape[2], Q=q, K=k, V=v, G=g)
    _repair(repair_keys, (q, k, v, g, do, dq, dk, dg), hot, cu_seqlens, scale, operands, do, shares)


def _repair(kernel: Any, tensors, hot, cu_seqlens, scale, operands, y, constexprs) -> None:
    (slots, heads, key_dim), value_dim = hot.shape, y.shape[3]
    with launching(kernel.__name__, y):
        kernel[(slots * heads,)](
            *((x, *x.stride()[:3]) for x in tensors),
            hot,
            cu_seqlens,
            float(scale),
            y.shape[1],
            **constexprs,
            K=key_dim,
            V=value_dim,
            HEADS=heads,
            TERMS=_terms(tensors[3], operands),
            PRECISION=_precision(operands),
            KEYS=triton.next_power_of_2(key_dim),
            BLOCK_K=tile_columns(key_dim),
            BLOCK_V=tile_columns(value_dim),
            num_warps=4,
            num_stages=1,
        )


def _constexprs(launch: ChunkLaunch, heads: int, key_dim: int, value_dim: int, g: Tensor | None, operands: str) -> Any:
    """Return the constexprs and launch options that all sweeps have in common."""
    return {
        "K": key_dim,
        "V": value_dim,
        "HEADS": heads,
        "GATE": _gate(g),
        "TERMS": _terms(g, operands),
        "PRECISION": _precision(operands),
        "BLOCK_K": launch.block_k,
        "STAGES": launch.num_stages,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def _rows(x: Tensor, phi: Any) -> int:
    """Return the number of rows of the state for keys or queries x."""
    return x.shape[3] if phi is None else features.count(x.shape[3])


def _columns(launch: ChunkLaunch, x: Tensor, phi: Any) -> int:
    """Return the columns of a tile of keys or queries x; with features a tile holds all columns of x."""
    return launch.block_k if phi is None else tile_columns(x.shape[3])


def _dims(x: Tensor) -> Any:
    return {"DIM": x.shape[3], "BLOCK_D": tile_columns(x.shape[3])}


@lru_cache(maxsize=64)
def taylor_tables(dim: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tables that define the Taylor features of a vector of ``dim`` elements, in the order of ``features``.

    The first two tables, int32 [P], hold the columns whose product a feature is, -1 for a factor of 1. The third,
    fp32 [P], holds the weight of the product; it includes ``scale``, so that q's and k's features give the weights of
    z = scale * q.k.
    """
    i, j = torch.triu_indices(dim, dim, dtype=torch.int32)
    none, each = torch.full((dim + 1,), -1, dtype=torch.int32), torch.arange(dim, dtype=torch.int32)
    weights = torch.cat((torch.ones(1), torch.full((dim,), scale**0.5), scale * torch.where(i == j, 0.5**0.5, 1.0)))
    columns = (torch.cat((none[:1], each, i)), torch.cat((none, j)))
    return columns[0].to(device), columns[1].to(device), weights.to(device)


def _shares(heads: int, **tensors: Tensor | None) -> Any:
    """Return, for every tensor, how many of ``heads`` share one of its heads."""
    return {f"{name}_SHARE": 1 if x is None else heads // x.shape[2] for name, x in tensors.items()}


def _tile(x: Tensor, block: int, tma: bool) -> Any:
    """Return x as a kernel argument, a descriptor or a tuple: see ``primitives``."""
    if tma:
        x = x.transpose(1, 2)  # Triton drops leading ones of a loaded block for free, other ones through registers
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 64, block])
    return (x, *x.stride()[:3])


def _gates(g: Tensor | None, block: int, tma: bool) -> Any:
    """Return g as a kernel argument; gates per head are never a descriptor."""
    return None if g is None else _tile(g, block, tma and _gate(g) == "channel")


def _describable(launch: ChunkLaunch, cu_seqlens: Tensor | None, *tensors: Tensor | None) -> bool:
    """Return whether a launch can use descriptors for all of ``tensors`` (None is skipped).

    It needs TMA, rows at addresses divisible by 16 bytes, and unpacked sequences, which end where their tensors end.
    """
    if not launch.tma or cu_seqlens is not None:
        return False
    for x in tensors:
        if x is None:
            continue
        steps = [stride * x.element_size() for stride in x.stride()[:3]]
        if x.stride(3) != 1 or x.data_ptr() % 16 or not all(step > 0 and step % 16 == 0 for step in steps):
            return False
    return True


def _dense(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension and a token stride below FAR; a copy is rarely needed."""
    return x if x.stride(3) == 1 and x.stride(1) < FAR else x.contiguous()


def _gate(g: Tensor | None) -> str:
    return "" if g is None else "head" if g.shape[3] == 1 else "channel"


def _channel(g: Tensor | None) -> Tensor | None:
    """Return g if its gates are per channel, which the kernels load as tiles; else None."""
    return g if _gate(g) == "channel" else None


def _terms(g: Tensor | None, operands: str) -> int:
    """Return the number of bf16 parts that fp32 gates are split into; 1 for other gates."""
    return 1 if g is None or g.dtype != torch.float32 else 2 if operands == "bf16" else 3


def _precision(operands: str) -> str:
    """Return the precision of matrix products.

    fp16 operands use tf32: with decay factors they may exceed the range of fp16, and tf32 has as many mantissa bits.
    """
    exact = "ieee" if torch.version.hip else "tf32x3"
    return {"bf16": "bf16", "fp16": "tf32", "fp32": exact}[operands]


@cache
def _launch(kernel: str, device: torch.device, key_dim: int, value_dim: int, operands: str) -> ChunkLaunch:
    """Return the launch row; on a GPU, warn once if the row is not verified there."""
    name = architecture(device)
    launch = chunk_launch(kernel, name, key_dim, value_dim, operands)
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch
