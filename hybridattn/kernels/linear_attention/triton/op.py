"""The opaque op of chunked linear attention in Triton, forward and backward: shapes, launches, autograd.

B batch, T time, N sequences; q [B,T,Hq,K], k [B,T,H,K], v [B,T,Hv,V], g [B,T,Hg,K], [B,T,Hg,1] or None, state
[N,Hs,K,V]. Heads that are fewer than those of o are shared by neighbours: read where they are, not repeated.
"""

from functools import cache, reduce
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op
from triton.tools.tensor_descriptor import TensorDescriptor

from ...runtime.launch import architecture, warn_of_launch
from .backward import states, sweep_keys
from .forward import sweep_values
from .launch import ChunkLaunch, chunk_launch, tile_columns
from .repair import repair_keys, repair_values

FAR = 1 << 24  # elements from a token to the next, of which 32 bits still reach 64


@custom_op("hybridattn::linear_attention_triton", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs [B,T,max(Hq,Hv),V] in v's dtype and final states, fp32 [N,max(H,Hv),K,V]."""
    o, last = _outputs(q, k, v, cu_seqlens)
    if not o.numel() or not last.numel():
        return o.zero_(), last.zero_() if state is None else last.copy_(state)
    q, k, v = map(_dense, (q, k, v))
    g = None if g is None else _dense(g)
    hot = _flags(o, k, g, cu_seqlens)
    first = None if state is None else state.contiguous()
    _sweep_values(q, k, v, g, o, first, last, hot, cu_seqlens, scale, _precision(q, k, v), reverse=False)
    if hot is not None:
        _repair_values(q, k, v, g, o, hot, cu_seqlens, scale, reverse=False)
    return o, last


@forward.register_fake
def _(q, k, v, g, scale, state, cu_seqlens):
    return _outputs(q, k, v, cu_seqlens)


@custom_op("hybridattn::linear_attention_triton_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    do: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty without gates) and the initial state, from those of outputs and final states."""
    given = (q, k, v, q.new_empty(0) if g is None else g)
    if not do.numel() or not dlast.numel():
        zeros = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given]
        return zeros[0], zeros[1], zeros[2], zeros[3], dlast.clone()
    q, k, v, do = map(_dense, (q, k, v, do))
    g = None if g is None else _dense(g)
    dlast, first = dlast.contiguous(), None if state is None else state.contiguous()
    hot, precision = _flags(do, k, g, cu_seqlens), _precision(q, k, v)
    dq, dk, dv, dg = (_gradients_of(x, do, cu_seqlens) for x in given)
    dfirst = dlast.new_empty(dlast.shape[0], do.shape[2], *dlast.shape[2:])

    h = _states(k, v, g, do, first, hot, cu_seqlens, precision)
    dg = _sweep_keys(q, k, v, g, do, h, dq, dk, dg, dlast, dfirst, hot, cu_seqlens, scale, precision)
    _sweep_values(k, q, do, g, dv, dlast, None, hot, cu_seqlens, scale, precision, reverse=True)
    if hot is not None:
        _repair_keys(q, k, v, g, do, dq, dk, dg, hot, cu_seqlens, scale)
        _repair_values(q, k, do, g, dv, hot, cu_seqlens, scale, reverse=True)
    grads = [_summed(y, x) for y, x in zip((dq, dk, dv, dg), given, strict=True)]
    return grads[0], grads[1], grads[2], grads[3], dfirst.unflatten(1, (dlast.shape[1], -1)).sum(2)


@backward.register_fake
def _(q, k, v, g, scale, state, cu_seqlens, do, dlast):
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, q.new_empty(0) if g is None else g)
    ]
    return (*grads, torch.empty_like(dlast))


def _save(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, state, cu_seqlens)


def _backward(ctx, do, dlast):
    q, k, v, g, state, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, dg, dfirst = backward(q, k, v, g, ctx.scale, state, cu_seqlens, do, dlast)
    return dq, dk, dv, None if g is None else dg, None, None if state is None else dfirst, None


forward.register_autograd(_backward, setup_context=_save)


def _outputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (*v.shape[:2], max(q.shape[2], v.shape[2]), v.shape[3])
    o = v.new_empty(shape) if cu_seqlens is None else v.new_zeros(shape)  # no program has tokens past the last offset
    states = max(k.shape[2], v.shape[2])
    return o, v.new_empty(sequences, states, k.shape[3], v.shape[3], dtype=torch.float32)


def _flags(o: Tensor, k: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Room for the flags of hot channels, [slots,heads,K]; None where gates, per head or none at all, have none."""
    if g is None or g.shape[3] == 1:
        return None
    new = torch.empty if cu_seqlens is None else torch.zeros  # of a packed row, not all slots have a chunk
    return new(_slots(o, cu_seqlens)[0], o.shape[2], k.shape[3], dtype=torch.int32, device=o.device)


def _slots(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Slots for the chunks of all sequences, see ``find_sequence``, and sequences."""
    if cu_seqlens is None:
        return x.shape[0] * -(-x.shape[1] // 64), x.shape[0]
    sequences = len(cu_seqlens) - 1
    return x.shape[1] // 64 + sequences, sequences


def _gradients_of(x: Tensor, y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the gradients of x, for every head of y: in fp32 where some of these will be summed."""
    new = x.new_empty if cu_seqlens is None else x.new_zeros
    if not x.numel():
        return new(0)
    shared = x.shape[2] < y.shape[2]
    return new(*x.shape[:2], y.shape[2], x.shape[3], dtype=torch.float32 if shared else x.dtype)


def _summed(grads: Tensor, x: Tensor) -> Tensor:
    """Gradients of x, from those of the heads that share it."""
    if grads.shape == x.shape:
        return grads
    return grads.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------- launches
def _states(k, v, g, do, first, hot, cu_seqlens, precision) -> Tensor:
    """The states before all chunks, [slots,V,heads,K]."""
    (batch, tokens, heads, value_dim), key_dim = do.shape, k.shape[3]
    slots, sequences = _slots(do, cu_seqlens)
    h = k.new_empty(
        slots, value_dim, heads, key_dim, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    launch, gate = _launch("states", k.device, key_dim, value_dim, precision), _gate(g)
    tma = launch.tma and cu_seqlens is None and all(map(_describable, (k, v, h, *([g] if gate == "channel" else []))))
    kernel: Any = states
    with torch.cuda.device_of(k):  # Triton launches on the current device
        kernel[(sequences * heads * triton.cdiv(key_dim, launch.block_k) * triton.cdiv(value_dim, 64),)](
            _tile(k, launch.block_k, tma),
            _tile(v, 64, tma),
            None if g is None else _tile(g, launch.block_k, tma and gate == "channel"),
            _tile(h, launch.block_k, tma),
            first,
            hot,
            cu_seqlens,
            tokens,
            K=key_dim,
            V=value_dim,
            HEADS=heads,
            K_SHARE=heads // k.shape[2],
            V_SHARE=heads // v.shape[2],
            G_SHARE=1 if g is None else heads // g.shape[2],
            STATE_SHARE=1 if first is None else heads // first.shape[1],
            GATE=gate,
            TERMS=_terms(g, precision),
            PRECISION=precision,
            TMA=tma,
            BLOCK_K=launch.block_k,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return h


def _sweep_keys(q, k, v, g, do, h, dq, dk, dg, dlast, dfirst, hot, cu_seqlens, scale, precision) -> Tensor:
    """Gradients of q, k and the initial state where they belong; returns those of g."""
    (_, tokens, heads, value_dim), key_dim = do.shape, k.shape[3]
    launch, gate = _launch("sweep_keys", k.device, key_dim, value_dim, precision), _gate(g)
    blocks = triton.cdiv(key_dim, launch.block_k)
    if gate == "head":  # every program has a part
        dg = dg.new_zeros(*do.shape[:3], blocks, dtype=torch.float32)
    tiles = [q, k, v, do, h, dq, dk, *([g, dg] if gate == "channel" else [])]
    tma = launch.tma and cu_seqlens is None and all(map(_describable, tiles))
    kernel: Any = sweep_keys
    with torch.cuda.device_of(k):
        kernel[(dfirst.shape[0] * heads * blocks,)](
            _tile(q, launch.block_k, tma),
            _tile(k, launch.block_k, tma),
            _tile(v, 64, tma),
            None if g is None else _tile(g, launch.block_k, tma and gate == "channel"),
            _tile(do, 64, tma),
            _tile(h, launch.block_k, tma),
            _tile(dq, launch.block_k, tma),
            _tile(dk, launch.block_k, tma),
            None if g is None else _tile(dg, launch.block_k, tma and gate == "channel"),
            dlast,
            dfirst,
            hot,
            cu_seqlens,
            float(scale),
            tokens,
            K=key_dim,
            V=value_dim,
            HEADS=heads,
            Q_SHARE=heads // q.shape[2],
            K_SHARE=heads // k.shape[2],
            V_SHARE=heads // v.shape[2],
            G_SHARE=1 if g is None else heads // g.shape[2],
            STATE_SHARE=heads // dlast.shape[1],
            GATE=gate,
            TERMS=_terms(g, precision),
            PRECISION=precision,
            TMA=tma,
            BLOCK_K=launch.block_k,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return dg.sum(3, keepdim=True) if gate == "head" else dg


def _sweep_values(a, w, u, g, y, first, last, hot, cu_seqlens, scale, precision, *, reverse) -> None:
    (_, tokens, heads, value_dim), key_dim = y.shape, a.shape[3]
    launch, gate = _launch("sweep_values", a.device, key_dim, value_dim, precision), _gate(g)
    tma = launch.tma and cu_seqlens is None and all(map(_describable, (a, w, u, y, *([g] if gate == "channel" else []))))
    carried = first if last is None else last
    kernel: Any = sweep_values
    with torch.cuda.device_of(y):
        kernel[(_slots(y, cu_seqlens)[1] * heads * triton.cdiv(value_dim, launch.block_v),)](
            *(_tile(x, launch.block_k, tma) for x in (a, w)),
            _tile(u, launch.block_v, tma),
            None if g is None else _tile(g, launch.block_k, tma and gate == "channel"),
            _tile(y, launch.block_v, tma),
            first,
            last,
            hot,
            cu_seqlens,
            float(scale),
            tokens,
            K=key_dim,
            V=value_dim,
            HEADS=heads,
            A_SHARE=heads // a.shape[2],
            W_SHARE=heads // w.shape[2],
            U_SHARE=heads // u.shape[2],
            G_SHARE=1 if g is None else heads // g.shape[2],
            STATE_SHARE=heads // carried.shape[1],
            GATE=gate,
            TERMS=_terms(g, precision),
            PRECISION=precision,
            REVERSE=reverse,
            TMA=tma,
            BLOCK_K=launch.block_k,
            BLOCK_V=launch.block_v,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def _repair_values(q, k, u, g, y, hot, cu_seqlens, scale, *, reverse) -> None:
    tensors = (q, k, u, g, y)
    shares = {f"{name}_SHARE": y.shape[2] // x.shape[2] for name, x in zip("QKUG", tensors, strict=False)}
    _repair(repair_values, tensors, hot, cu_seqlens, scale, y, _precision(q, k, u), {**shares, "REVERSE": reverse})


def _repair_keys(q, k, v, g, do, dq, dk, dg, hot, cu_seqlens, scale) -> None:
    tensors = (q, k, v, g, do, dq, dk, dg)
    shares = {f"{name}_SHARE": do.shape[2] // x.shape[2] for name, x in zip("QKVG", tensors, strict=False)}
    _repair(repair_keys, tensors, hot, cu_seqlens, scale, do, _precision(q, k, v), shares)


def _repair(kernel: Any, tensors, hot, cu_seqlens, scale, y, precision, constexprs) -> None:
    key_dim, value_dim = hot.shape[2], y.shape[3]
    with torch.cuda.device_of(y):
        kernel[(hot.shape[0] * hot.shape[1],)](
            *((x, *x.stride()[:3]) for x in tensors),
            hot,
            cu_seqlens,
            float(scale),
            y.shape[1],
            K=key_dim,
            V=value_dim,
            HEADS=hot.shape[1],
            **constexprs,
            TERMS=_terms(tensors[3], precision),
            PRECISION=precision,
            KEYS=triton.next_power_of_2(key_dim),
            BLOCK_K=tile_columns(key_dim),
            BLOCK_V=tile_columns(value_dim),
            num_warps=4,
            num_stages=1,
        )


def _tile(x: Tensor, block: int, tma: bool) -> Any:
    """x as the kernels take it: see ``primitives``."""
    if tma:
        x = x.transpose(1, 2)  # only leading ones of a loaded block are dropped without passing through registers
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 64, block])
    return (x, *x.stride()[:3])


def _describable(x: Tensor) -> bool:
    """Whether TMA can load x: addresses of rows are divisible by 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:3]]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _dense(x: Tensor) -> Tensor:
    """x with neighbouring elements in its last dimension and tokens not FAR from each other; a view nearly always."""
    return x if x.stride(3) == 1 and x.stride(1) < FAR else x.contiguous()


def _gate(g: Tensor | None) -> str:
    return "" if g is None else "head" if g.shape[3] == 1 else "channel"


def _terms(g: Tensor | None, precision: str) -> int:
    """Parts in bf16 that gates in fp32 are split into."""
    return 1 if g is None or g.dtype != torch.float32 else 2 if precision == "bf16" else 3


def _precision(*tensors: Tensor) -> str:
    """How products are computed: scaled operands outgrow fp16, whose 11 bits tf32 has too."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    if dtype != torch.float32:
        return "bf16" if dtype == torch.bfloat16 else "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


@cache
def _launch(kernel: str, device: torch.device, key_dim: int, value_dim: int, precision: str) -> ChunkLaunch:
    """The launch row, with what has to be said about it said."""
    name = architecture(device)
    launch = chunk_launch(kernel, name, key_dim, value_dim, precision != "bf16")
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch
