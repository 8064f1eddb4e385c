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
from .. import chunked
from .forward import sweep_values
from .launch import ChunkLaunch, chunk_launch, tile_columns
from .repair import repair_values

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
    _sweep(q, k, v, g, o, first, last, hot, cu_seqlens, scale, _precision(q, k, v), reverse=False)
    if hot is not None:
        _repair(q, k, v, g, o, hot, cu_seqlens, scale)
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
    """Gradients of q, k, v, g (empty without gates) and the initial state, from those of outputs and final states.

    The matrix products of the torch backend: there is no kernel yet.
    """
    heads = do.shape[2]
    given = (q, k, v, q.new_empty(0) if g is None else g)
    if not do.numel() or not dlast.numel():
        zeros = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given]
        return zeros[0], zeros[1], zeros[2], zeros[3], dlast.clone()
    repeated = [None if x is None else x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k, v, g)]
    share = heads // dlast.shape[1]
    first = torch.zeros_like(dlast) if state is None else state
    after = dlast.new_zeros(dlast.shape[0], heads, *dlast.shape[2:])
    after[:, ::share] = dlast  # one of the heads that share a state is given its gradient: all are added up
    _, _, starts = chunked.forward(*repeated, scale, None, first.repeat_interleave(share, 1), cu_seqlens)
    *grads, dfirst = chunked.backward(*repeated, scale, None, starts, cu_seqlens, do, after)
    summed = [
        y if y.shape == x.shape else y.unflatten(2, (x.shape[2], -1)).sum(3) for x, y in zip(given, grads, strict=True)
    ]
    return (*summed, dfirst.unflatten(1, (-1, share)).sum(2))


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
    if cu_seqlens is None:
        slots, new = o.shape[0] * -(-o.shape[1] // 64), torch.empty
    else:
        slots, new = o.shape[1] // 64 + len(cu_seqlens) - 1, torch.zeros
    return new(slots, o.shape[2], k.shape[3], dtype=torch.int32, device=o.device)


# ------------------------------------------------------------------------------------------------------------- launches
def _sweep(a, w, u, g, y, first, last, hot, cu_seqlens, scale, precision, *, reverse) -> None:
    (batch, tokens, heads, value_dim), key_dim = y.shape, a.shape[3]
    launch = _launch(a.device, key_dim, value_dim, precision)
    gate = _gate(g)
    tiles = [a, w, u, y, *([g] if gate == "channel" else [])]
    tma = launch.tma and cu_seqlens is None and all(map(_describable, tiles))
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    states = heads if last is None else last.shape[1]
    kernel: Any = sweep_values
    with torch.cuda.device_of(y):  # Triton launches on the current device
        kernel[(sequences * heads * triton.cdiv(value_dim, launch.block_v),)](
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
            STATE_SHARE=heads // states,
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


def _repair(q, k, v, g, o, hot, cu_seqlens, scale) -> None:
    (_, tokens, heads, value_dim), key_dim = o.shape, k.shape[3]
    precision = _precision(q, k, v)
    block_k, block_v = tile_columns(key_dim), tile_columns(value_dim)
    kernel: Any = repair_values
    with torch.cuda.device_of(o):
        kernel[(hot.shape[0] * heads,)](
            *((x, *x.stride()[:3]) for x in (q, k, v, g, o)),
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
            G_SHARE=heads // g.shape[2],
            TERMS=_terms(g, precision),
            PRECISION=precision,
            KEYS=triton.next_power_of_2(key_dim),
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=4,
            num_stages=1,
        )


def _tile(x: Tensor, block: int, tma: bool) -> Any:
    """x as the kernels take it: see ``primitives``."""
    if tma:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 64, 1, block])
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
def _launch(device: torch.device, key_dim: int, value_dim: int, precision: str) -> ChunkLaunch:
    """The launch row, with what has to be said about it said."""
    name = architecture(device)
    launch = chunk_launch(name, key_dim, value_dim, precision != "bf16")
    if device.type != "cpu":
        warn_of_launch(name, launch.name, launch.verified)
    return launch
