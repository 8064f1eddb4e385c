"""What the kernels of linear attention are held to: the rows that are compiled, and what a launch may move."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ...runtime.launch import CompileRow, Traffic
from .decode import step_kernel
from .forward import sweep_values
from .launch import CHUNK, STEP, ChunkLaunch, StepLaunch, chunk_launch, step_launch, tile_columns
from .repair import repair_values

Kind = str | tuple[str, ...]

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

# Kinds of a sweep beside the usual one: what differs from the arguments of ``_sweep_row``.
SWEEP_KINDS = {
    "reverse": {"reverse": True},
    "fp16": {"dtype": "fp16", "gates": "fp16"},
    "fp32-gates": {"gates": "fp32"},
    "per-head": {"gate": "head"},
    "per-head reverse": {"gate": "head", "reverse": True},
    "no-gate": {"gate": ""},
    "packed": {"packed": True},
}


def compile_rows(architecture: str) -> Iterator[CompileRow]:
    """Every launch row of an architecture, and at key dim 128 every kind of step."""
    for key_dim in STEP[architecture]:
        yield _step_row(step_launch(architecture, key_dim), "", "bf16", "channel", 1, 128, True)
    for kind, values in STEP_KINDS.items():
        yield _step_row(step_launch(architecture, 128), f" {kind}", *values)
    for key_dim in CHUNK[architecture]:
        for dtype in ("bf16", "fp32"):
            yield _sweep_row(architecture, key_dim, "", dtype=dtype, gates=dtype)
    for kind, values in SWEEP_KINDS.items():
        yield _sweep_row(architecture, 128, f" {kind}", **values)
    yield _repair_row(architecture, repair_values, ("q", "k", "v", "o"))


def _step_row(
    launch: StepLaunch, kind: str, dtype: str, gate: str, queries: int, value_dim: int, aligned: bool
) -> CompileRow:
    """One new token, which the JIT specialises on."""
    by_16 = ":16" if aligned else ""
    strides = ["q_batch", "q_time", "q_head", "k_batch", "k_time", "k_head", "v_batch", "v_time", "v_head"]
    gates = ["g_batch", "g_time", "g_head"]
    states = ["state_batch", "state_head", "state_key"]
    signature: dict[str, Kind] = {
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


# ------------------------------------------------------------------------------------------------------- chunked sweeps
def _tile_type(dtype: str, block: int, tma: bool) -> Kind:
    return f"tensordesc<{dtype}[1,64,1,{block}]>" if tma else (f"*{dtype}:16", *["i32:16"] * 3)


def _products(architecture: str, dtype: str, gates: str) -> dict[str, int | str]:
    exact = "ieee" if architecture.startswith("gfx") else "tf32x3"
    precision = {"bf16": "bf16", "fp16": "tf32", "fp32": exact}[dtype]
    return {"PRECISION": precision, "TERMS": 1 if gates != "fp32" else 2 if dtype == "bf16" else 3}


def _sweep_row(
    architecture: str,
    key_dim: int,
    kind: str,
    dtype: str = "bf16",
    gates: str = "bf16",
    gate: str = "channel",
    reverse: bool = False,
    packed: bool = False,
) -> CompileRow:
    launch = chunk_launch(architecture, key_dim, 512, dtype != "bf16")
    tma = launch.tma and not packed
    keys, values = (_tile_type(dtype, block, tma) for block in (launch.block_k, launch.block_v))
    signature: dict[str, Kind] = {
        **dict.fromkeys(("a", "w"), keys),
        **dict.fromkeys(("u", "y"), values),
        "g": _tile_type(gates, launch.block_k, tma)
        if gate == "channel"
        else (f"*{gates}:16", "i32:16", "i32:16", "i32:1"),
        **dict.fromkeys(("first", "last"), "*fp32:16"),
        "hot": "*i32:16",
        "cu_seqlens": "*i64:16",
        "scale": "fp32",
        "T": "i32:16",
    }
    constexprs = {
        **({} if gate else {"g": None}),
        **({} if gate == "channel" else {"hot": None}),
        **({} if packed else {"cu_seqlens": None}),
        "K": key_dim,
        "V": 128,
        "HEADS": 16,
        **dict.fromkeys(("A_SHARE", "W_SHARE", "U_SHARE", "G_SHARE", "STATE_SHARE"), 1),
        "GATE": gate,
        **_products(architecture, dtype, gates),
        "REVERSE": reverse,
        "TMA": tma,
        "BLOCK_K": launch.block_k,
        "BLOCK_V": launch.block_v,
        "STAGES": launch.num_stages,
    }
    return CompileRow(launch.name + kind, sweep_values, signature, constexprs, launch.num_warps, launch.num_stages)


def _repair_row(architecture: str, kernel: Any, values: Sequence[str]) -> CompileRow:
    name = kernel.fn.__name__
    signature: dict[str, Kind] = {
        **dict.fromkeys((*values, "g"), _tile_type("bf16", 64, False)),
        "hot": "*i32:16",
        "scale": "fp32",
        "T": "i32:16",
    }
    constexprs = {
        "cu_seqlens": None,
        "K": 128,
        "V": 128,
        "HEADS": 16,
        **dict.fromkeys(("Q_SHARE", "K_SHARE", "V_SHARE", "G_SHARE"), 1),
        **_products(architecture, "bf16", "bf16"),
        "KEYS": 128,
        **dict.fromkeys(("BLOCK_K", "BLOCK_V"), tile_columns(128)),
    }
    return CompileRow(f"linear_attention_{name}", kernel, signature, constexprs, 4, 1)


def sweep_traffic(launch: ChunkLaunch, a: Tensor, w: Tensor, u: Tensor, g: Tensor | None, y: Tensor) -> Traffic:
    """Everything once; but each block of columns reads a, w and g for itself, as does each head that shares them."""
    blocks, heads = -(-u.shape[3] // launch.block_v), y.shape[2]
    loads = {name: blocks * heads / x.shape[2] for name, x in {"a": a, "w": w, "g": g}.items() if x is not None}
    return Traffic(1.0, {**loads, "u": heads / u.shape[2], "first": heads}, {"y": 1.0, "last": 1.0, "hot": 1.0})
