"""Other libraries' implementations of the benchmark's workloads, for ``hybridattn kernels bench --peers``."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybridattn.workshop.workloads import WORKLOADS, Call, Workload


def peers(name: str, device: torch.device) -> dict[str, Call]:
    """Return other implementations of a workload on the device, by name.

    They are PyTorch's and, if it is installed, flash-linear-attention's.
    """
    workload, on_gpu = WORKLOADS[name], device.type == "cuda"
    found: dict[str, Call] = {}
    if workload.kind == "cache":
        found["SDPA"] = _sdpa_one_token
    elif name.startswith("softmax"):
        if workload.window is None:
            backends = {"flash": SDPBackend.FLASH_ATTENTION}
            if on_gpu:
                backends |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
            found |= {f"SDPA {short}": _sdpa(workload, backend) for short, backend in backends.items()}
        if on_gpu:
            found["FlexAttention"] = _flex_attention(workload)
    if on_gpu and find_spec("fla"):
        found |= _flash_linear_attention(name)
    return found


def _heads_first(call: Callable[..., Tensor]) -> Call:
    """Adapt a call on [batch, heads, time, dim] to [batch, time, heads, dim], the layout of all workloads."""
    return lambda *x: call(*(y.transpose(1, 2) for y in x)).transpose(1, 2)


def _sdpa(workload: Workload, backend: SDPBackend) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=workload.causal)

    return _heads_first(call)


def _sdpa_one_token(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Compute attention over the whole cache; SDPA takes no lengths, and the caches of the benchmark are full."""
    return _heads_first(F.scaled_dot_product_attention)(q, k, v)


def _flex_attention(workload: Workload) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        if tokens not in masks and workload.causal:
            reach = workload.window or tokens
            masks[tokens] = create_block_mask(
                lambda b, h, t, s: (t >= s) & (t - s < reach), None, None, tokens, tokens, device=q.device.type
            )
        return compiled(q, k, v, block_mask=masks.get(tokens))  # pyright: ignore

    return _heads_first(call)


def _flash_linear_attention(name: str) -> dict[str, Call]:
    from fla.ops.attn.parallel import parallel_attn  # pyright: ignore[reportMissingImports]
    from fla.ops.based import parallel_based  # pyright: ignore[reportMissingImports]
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
    )
    from fla.ops.gla import chunk_gla, fused_recurrent_gla  # pyright: ignore[reportMissingImports]
    from fla.ops.kda import chunk_kda  # pyright: ignore[reportMissingImports]
    from fla.ops.linear_attn import chunk_linear_attn  # pyright: ignore[reportMissingImports]
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, is_copied: bool) -> Tensor:
        o, after = fused_recurrent_gla(q, k, v, gk=g, initial_state=state, output_final_state=True)
        if is_copied:  # fla does not update the state in place
            state.copy_(after)
        return o

    def delta(operator: Any, *x: Tensor, **options: Any) -> Tensor:
        return operator(*x, use_qk_l2norm_in_kernel=True, **options)[0]

    def delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        options: dict[str, Any] = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        o, after = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, **options)
        state.copy_(after)
        return o

    theirs: dict[str, dict[str, Any]] = {
        "gated, per channel": {"fla chunk_gla": lambda q, k, v, g: chunk_gla(q, k, v, g)[0]},  # pyright: ignore
        "gated, per head": {"fla chunk_simple_gla": lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]},  # pyright: ignore
        "no gate": {"fla chunk_linear_attn": lambda *x: chunk_linear_attn(*x, normalize=False)[0]},  # pyright: ignore
        "taylor": {"fla parallel_based": parallel_based},
        "gated step": {
            "fla fused_recurrent_gla": partial(step, is_copied=True),
            "fla fused_recurrent_gla, state not copied": partial(step, is_copied=False),
        },
        "delta, per channel": {"fla chunk_kda": partial(delta, chunk_kda)},
        "delta, per head": {"fla chunk_gated_delta_rule": partial(delta, chunk_gated_delta_rule)},
        "delta step": {"fla fused_recurrent_gated_delta_rule": delta_step},
        "softmax, causal": {"fla parallel_attn": parallel_attn},
        "softmax, window 512": {"fla parallel_attn": partial(parallel_attn, window_size=512)},
        "softmax, window 4096": {"fla parallel_attn": partial(parallel_attn, window_size=4096)},
    }
    return theirs.get(name, {})
