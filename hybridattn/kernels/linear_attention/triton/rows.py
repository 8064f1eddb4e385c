"""What the kernels of linear attention are held to: the rows that are compiled, and what a launch may move."""

from collections.abc import Iterator

from torch import Tensor

from ...runtime.launch import CompileRow, Traffic
from .decode import step_kernel
from .launch import STEP, StepLaunch, step_launch

# Kinds of a step beside the usual one (bf16, a gate per channel): dtype, gate ("channel", "head" or ""), query heads
# per state, value dim, and whether addresses and strides are divisible by 16.
STEP_KINDS = {
    "fp32": ("fp32", "channel", 1, 128, True),
    "fp16": ("fp16", "channel", 1, 128, True),
    "per-head": ("bf16", "head", 1, 128, True),
    "no-gate": ("bf16", "", 1, 128, True),
    "4-queries": ("bf16", "channel", 4, 128, True),
    "odd": ("bf16", "channel", 1, 129, False),
}


def compile_rows(architecture: str) -> Iterator[CompileRow]:
    """Every launch row of an architecture, and at key dim 128 every kind of step."""
    for key_dim in STEP[architecture]:
        yield _step_row(step_launch(architecture, key_dim), "", "bf16", "channel", 1, 128, True)
    for kind, values in STEP_KINDS.items():
        yield _step_row(step_launch(architecture, 128), f" {kind}", *values)


def _step_row(
    launch: StepLaunch, kind: str, dtype: str, gate: str, queries: int, value_dim: int, aligned: bool
) -> CompileRow:
    """One new token, which the JIT specialises on."""
    by_16 = ":16" if aligned else ""
    strides = ["q_batch", "q_time", "q_head", "k_batch", "k_time", "k_head", "v_batch", "v_time", "v_head"]
    gates = ["g_batch", "g_time", "g_head"]
    states = ["state_batch", "state_head", "state_key"]
    signature = {
        **dict.fromkeys(("q", "k", "v", "o"), f"*{dtype}{by_16}"),
        **({"g": f"*{dtype}{by_16}"} if gate else {}),
        "state": f"*fp32{by_16}",
        "scale": "fp32",
        "tokens": "i32:1",
        **dict.fromkeys([*strides, *gates, *states], f"i32{by_16}"),
        **({"g_head": "i32:1"} if gate == "head" else {}),
    }
    constexprs = {
        **({} if gate else {"g": None}),
        "K": launch.block_k if aligned else launch.block_k - 1,
        "V": value_dim,
        "STATES": 16,
        "QUERIES": queries,
        "QUERY_SHARE": 1,
        "KEY_SHARE": 1,
        "GATE_SHARE": 1 if gate else 0,
        "GATE_PER_CHANNEL": gate == "channel",
        "BLOCK_K": launch.block_k,
        "BLOCK_V": launch.block_v,
    }
    return CompileRow(launch.name + kind, step_kernel, signature, constexprs, launch.num_warps, launch.num_stages)


def step_traffic(launch: StepLaunch, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> Traffic:
    """Everything once; but each block of columns reads q, k and g for itself, and each state that shares them, too."""
    blocks, states = -(-v.shape[3] // launch.block_v), state.shape[1]
    loads = {
        "state": 1.0,
        "v": 1.0,
        "q": blocks * max(states / q.shape[2], 1.0),
        "k": blocks * states / k.shape[2],
        **({} if g is None else {"g": blocks * states / g.shape[2]}),
    }
    return Traffic(1.0, loads, {"state": 1.0, "o": 1.0})
