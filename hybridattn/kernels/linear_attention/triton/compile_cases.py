"""Compilations and traffic bounds that the linear-attention kernels are checked against.

``compile_rows`` lists the launch rows with their argument types. ``step_traffic`` and ``sweep_traffic`` bound the bytes
that a launch may move.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...runtime.architectures import CompileRow, Traffic
from .backward import sweep_keys
from .chunk_states import scan_states, states
from .decode import step_kernel
from .delta_backward import delta_gradients, sweep_gradients
from .delta_chunks import solve_chunks
from .delta_forward import sweep_delta
from .forward import sweep_values
from .hot_channels import repair_keys, repair_values
from .launch import DELTA, KEYS, STEP, VALUES, ChunkLaunch, StepLaunch, chunk_launch, step_launch, tile_columns
from .taylor import sweep_features

Kind = str | tuple[str, ...]

# Variants of a step besides the default (bf16, a gate per channel): dtype, gate ("channel", "head" or ""), query heads
# per state, value dim, and whether addresses and strides are divisible by 16.
STEP_KINDS = {
    "fp32": ("fp32", "channel", 1, 128, True),
    "fp16": ("fp16", "channel", 1, 128, True),
    "per-head": ("bf16", "head", 1, 128, True),
    "no-gate": ("bf16", "", 1, 128, True),
    "4-queries": ("bf16", "channel", 4, 128, True),
    "odd": ("bf16", "channel", 1, 129, False),
}
# The same for the delta rule, with normalised queries and keys.
DELTA_STEP_KINDS = {
    "delta": ("bf16", "channel", 1, 128, True),
    "delta fp32": ("fp32", "channel", 1, 128, True),
    "delta per-head": ("bf16", "head", 1, 128, True),
    "delta no-gate": ("bf16", "", 1, 128, True),
}

# Variants of a sweep besides the default (bf16, a gate per channel): arguments of ``_sweep_row``.
SWEEP_KINDS = {
    "fp32-gates": {"gates": "fp32"},
    "per-head": {"gate": "head"},
    "no-gate": {"gate": ""},
    "packed": {"packed": True},
}


def compile_rows(architecture: str) -> Iterator[CompileRow]:
    """Yield every launch row of an architecture, and the variants of the kernels at key dim 128."""
    for key_dim in STEP[architecture]:
        yield _step_row(step_launch(architecture, key_dim), "", "bf16", "channel", 1, 128, True)
    for kind, values in STEP_KINDS.items():
        yield _step_row(step_launch(architecture, 128), f" {kind}", *values)
    for key_dim in (64, 128, 256):
        yield _step_row(step_launch(architecture, key_dim), " delta", *DELTA_STEP_KINDS["delta"], delta=True)
    for kind, values in list(DELTA_STEP_KINDS.items())[1:]:
        yield _step_row(step_launch(architecture, 128), f" {kind}", *values, delta=True)
    for dtype in VALUES[architecture]:
        for key_dim in VALUES[architecture][dtype]:
            yield _sweep_row(architecture, sweep_values, key_dim, 128, "", dtype=dtype, gates=dtype)
        for value_dim in KEYS[architecture][dtype]:
            yield _sweep_row(architecture, sweep_keys, 128, value_dim, "", dtype=dtype, gates=dtype)
        yield _sweep_row(architecture, states, 128, 128, "", dtype=dtype, gates=dtype)
    for kind, values in SWEEP_KINDS.items():
        yield _sweep_row(architecture, sweep_values, 128, 128, f" {kind}", **values)
        yield _sweep_row(architecture, sweep_keys, 128, 128, f" {kind}", **values)
    for kind in ("", "per-head", "no-gate"):
        values = {**SWEEP_KINDS.get(kind, {}), "REVERSE": True}
        yield _sweep_row(architecture, sweep_values, 128, 128, f" {kind} reverse".replace("  ", " "), **values)
    for kernel in (sweep_values, sweep_keys, states):
        yield _sweep_row(architecture, kernel, 128, 128, " segments", segments=True)
    yield _sweep_row(architecture, states, 128, 128, " segments reverse", segments=True, REVERSE=True)
    yield _scan_row()
    for kernel in (sweep_values, states, sweep_features):
        for dtype in VALUES[architecture] if kernel is sweep_features else ("bf16",):
            yield _sweep_row(architecture, kernel, 153, 128, " taylor", dtype=dtype, gate="", dim=16)
    yield _sweep_row(architecture, sweep_values, 153, 128, " taylor reverse", gate="", dim=16, REVERSE=True)
    for kernel, constexprs in ((repair_values, {"REVERSE": False}), (repair_keys, {})):
        yield _repair_row(architecture, kernel, constexprs)
    yield from _delta_rows(architecture)


def _step_row(
    launch: StepLaunch,
    kind: str,
    dtype: str,
    gate: str,
    queries: int,
    value_dim: int,
    aligned: bool,
    delta: bool = False,
) -> CompileRow:
    """Return the compilation of a step with one new token; the JIT specialises on the number 1."""
    by_16 = ":16" if aligned else ""
    strides = ["q_batch", "q_time", "q_head", "k_batch", "k_time", "k_head", "v_batch", "v_time", "v_head"]
    gates = ["g_batch", "g_time", "g_head"]
    states = ["state_batch", "state_head", "state_key"]
    signature: dict[str, Kind] = {
        **dict.fromkeys(("q", "k", "v", "o"), f"*{dtype}{by_16}"),
        **({"g": f"*{dtype}{by_16}"} if gate else {}),
        **({"beta": (f"*{dtype}{by_16}", f"i32{by_16}", f"i32{by_16}", "i32:1")} if delta else {}),
        "state": f"*fp32{by_16}",
        "scale": "fp32",
        "tokens": "i32:1",
        **dict.fromkeys([*strides, *gates, *states], f"i32{by_16}"),
        **({"g_head": "i32:1"} if gate == "head" else {}),
    }
    constexprs = {
        **({} if gate else {"g": None}),
        **({} if delta else {"beta": None}),
        "NORMALIZE": delta,
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


def step_traffic(
    launch: StepLaunch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    beta: Tensor | None = None,
) -> Traffic:
    """Return the traffic bounds of a step: every byte once, except for q, k, g and beta.

    Each program, that is each block of value columns of each state, reads q, k, g and beta.
    """
    blocks, states = -(-v.shape[3] // launch.block_v), state.shape[1]
    loads = {
        "state": 1.0,
        "v": 1.0,
        "q": blocks * max(states / q.shape[2], 1.0),
        "k": blocks * states / k.shape[2],
        **({} if g is None else {"g": blocks * states / g.shape[2]}),
        **({} if beta is None else {"beta": float(blocks)}),
    }
    return Traffic(1.0, loads, {"state": 1.0, "o": 1.0})


# ------------------------------------------------------------------------------------------------------- chunked sweeps
def _tile_type(dtype: str, block: int, tma: bool) -> Kind:
    return f"tensordesc<{dtype}[1,1,64,{block}]>" if tma else (f"*{dtype}:16", *["i32:16"] * 3)


def _products(architecture: str, dtype: str, gates: str) -> dict[str, int | str]:
    exact = "ieee" if architecture.startswith("gfx") else "tf32x3"
    precision = {"bf16": "bf16", "fp16": "tf32", "fp32": exact}[dtype]
    return {"PRECISION": precision, "TERMS": 1 if gates != "fp32" else 2 if dtype == "bf16" else 3}


def _delta_rows(architecture: str) -> Iterator[CompileRow]:
    """Yield the rows of the delta rule, with normalised queries and keys, and their variants at key dim 128."""
    if not DELTA[architecture]:
        return
    kernels = (sweep_delta, sweep_gradients, solve_chunks, delta_gradients)
    for dtype in DELTA[architecture]:
        for key_dim in DELTA[architecture][dtype]:
            for kernel in kernels[:2]:
                yield _delta_row(architecture, kernel, key_dim, 128, "", dtype=dtype, gates=dtype)
        for kernel in kernels[2:]:
            yield _delta_row(architecture, kernel, 128, 128, f" {dtype}", dtype=dtype, gates=dtype)
    for kind in ("per-head", "no-gate"):
        for kernel in kernels:
            yield _delta_row(architecture, kernel, 128, 128, f" {kind}", **SWEEP_KINDS[kind])
    for kernel in kernels[:3]:
        yield _delta_row(architecture, kernel, 128, 128, " packed", packed=True)
    for kind in ("", "per-head", "no-gate"):
        values = {**SWEEP_KINDS.get(kind, {}), "states": True}
        yield _delta_row(architecture, sweep_delta, 128, 128, f" {kind} states".replace("  ", " "), **values)


def _delta_row(
    architecture: str,
    kernel: Any,
    key_dim: int,
    value_dim: int,
    kind: str,
    dtype: str = "bf16",
    gates: str = "bf16",
    gate: str = "channel",
    packed: bool = False,
    states: bool = False,
) -> CompileRow:
    """Return the compilation of a kernel of the delta rule."""
    name, swept = kernel.fn.__name__, kernel in (sweep_delta, sweep_gradients)
    launch = chunk_launch(name if swept else "sweep_delta", architecture, key_dim, value_dim, dtype)
    tma, channels = swept and launch.tma and not packed, gate == "channel"
    wide, solved = ("bf16", "fp16") if dtype == "bf16" else ("fp32", "fp32")
    keys, values = (_tile_type(dtype, block, tma) for block in (launch.block_k, launch.block_v))
    numbers = ("i32:16", "i32:16", "i32:1")  # strides of one number per token and head
    arguments: dict[str, Kind | None] = {
        **dict.fromkeys(("q", "k", "dq", "dk"), keys),
        **dict.fromkeys(("v", "y", "do"), values),
        **dict.fromkeys(("r", "dv", *(["y"] if states else [])), _tile_type(wide, launch.block_v, tma)),
        **dict.fromkeys(("g", "dg"), _tile_type(gates, launch.block_k, tma) if channels else None),
        **(_HEAD_GATES if gate == "head" else {}),
        "solved": _tile_type(solved, 64, tma),
        "beta": (f"*{dtype}:16", *numbers),
        "norms": ("*fp32:16", *numbers),
        "dbeta": ("*fp32:16", "i32:16", "i32:16", "i32"),
        "pairs": _tile_type(wide, 64, False) if channels and not states else None,
        **dict.fromkeys(("h", "dh"), f"*{wide}:16" if swept else _tile_type(wide, 64, False)),
        **dict.fromkeys(("first", "last", "dlast", "dfirst"), "*fp32:16"),
        **({"last": None} if states else {"h": None} if kernel is sweep_delta else {}),
        "hot": "*i32:16" if channels else None,
        "cu_seqlens": "*i64:16" if packed else None,
        "scale": "fp32",
        "T": "i32:16",
        "sequences": "i32",
    }
    known = {
        **dict.fromkeys(("K", "PADDED"), key_dim),
        "V": value_dim,
        "HEADS": 16,
        "GROUP": 1,
        "GATE": gate,
        "TMA": tma,
        **{name: 1 for name in kernel.arg_names if name.endswith("_SHARE")},
        **_products(architecture, dtype, gates),
        "SOLVE": "tf32" if dtype == "bf16" else _products(architecture, "fp32", gates)["PRECISION"],
        "STATES": states if swept else 16,
        "NORMALIZE": True,
        "BLOCK_K": 128 if kernel is delta_gradients else launch.block_k,
        "BLOCK_V": launch.block_v,
        "STAGES": launch.num_stages,
    }
    name = launch.name if swept else f"linear_attention_{name}"
    warps, stages = (launch.num_warps, launch.num_stages) if swept else (8 if kernel is delta_gradients else 4, 1)
    return _row(name + kind, kernel, arguments, known, warps, stages)


def _sweep_row(
    architecture: str,
    kernel: Any,
    key_dim: int,
    value_dim: int,
    kind: str,
    dtype: str = "bf16",
    gates: str = "bf16",
    gate: str = "channel",
    packed: bool = False,
    dim: int | None = None,
    segments: bool = False,
    **constexprs: int,
) -> CompileRow:
    """Return the compilation of a sweep; with Taylor features ``dim`` is K and ``key_dim`` the number of features."""
    name = kernel.fn.__name__
    launch = chunk_launch("sweep_keys" if kernel is sweep_features else name, architecture, key_dim, value_dim, dtype)
    tma = launch.tma and not packed
    columns = launch.block_k if dim is None else tile_columns(dim)
    keys = _tile_type(dtype, columns, tma)
    values = _tile_type(dtype, launch.block_v if kernel is sweep_values else 64, tma)
    channels = _tile_type(gates, launch.block_k, tma)
    arguments: dict[str, Kind | None] = {
        **dict.fromkeys(("a", "w", "q", "k", "dq", "dk"), keys),
        **dict.fromkeys(("u", "y", "v", "do"), values),
        **{"channel": {"g": channels, "dg": channels}, "head": _HEAD_GATES, "": {"g": None, "dg": None}}[gate],
        "h": _tile_type("bf16" if dtype == "bf16" else "fp32", launch.block_k, tma),
        **dict.fromkeys(("first", "last", "lost", "dlast", "dfirst"), "*fp32:16"),
        "hot": "*i32:16" if gate == "channel" else None,
        "cu_seqlens": "*i64:16" if packed else None,
        "features": None if dim is None else ("*i32:16", "*i32:16", "*fp32:16"),
        "scale": "fp32",
        "T": "i32:16",
        "segments": "i32" if segments else "i32:1",
    }
    if kernel is sweep_features:
        arguments |= dict.fromkeys(("dq", "dk"), _tile_type("fp32", columns, tma))
    known = {
        "DIM": dim or key_dim,
        "BLOCK_D": tile_columns(dim or key_dim),
        "K": key_dim,
        "V": value_dim,
        "HEADS": 16,
        **{name: 1 for name in kernel.arg_names if name.endswith("_SHARE")},
        "GATE": gate,
        "TMA": tma,
        "REVERSE": False,
        **constexprs,
        **_products(architecture, dtype, gates),
        "BLOCK_K": launch.block_k,
        "BLOCK_V": launch.block_v,
        "STAGES": launch.num_stages,
    }
    return _row(
        launch.name.replace(launch.kernel, name) + kind, kernel, arguments, known, launch.num_warps, launch.num_stages
    )


_HEAD_GATES: dict[str, Kind] = {
    "g": ("*bf16:16", "i32:16", "i32:16", "i32:1"),
    "dg": ("*fp32:16", "i32:16", "i32:16", "i32:1"),
}


def _repair_row(architecture: str, kernel: Any, constexprs: dict[str, bool]) -> CompileRow:
    tile = _tile_type("bf16", 64, False)
    arguments: dict[str, Kind | None] = {
        **dict.fromkeys(("q", "k", "v", "u", "y", "g", "do", "dq", "dk", "dg"), tile),
        "hot": "*i32:16",
        "cu_seqlens": None,
        "scale": "fp32",
        "T": "i32:16",
    }
    known = {
        "K": 128,
        "V": 128,
        "HEADS": 16,
        "KEYS": 128,
        **{name: 1 for name in kernel.arg_names if name.endswith("_SHARE")},
        **_products(architecture, "bf16", "bf16"),
        "BLOCK_K": tile_columns(128),
        "BLOCK_V": tile_columns(128),
        **constexprs,
    }
    return _row(f"linear_attention_{kernel.fn.__name__}", kernel, arguments, known, 4, 1)


def _scan_row() -> CompileRow:
    arguments: dict[str, Kind | None] = dict.fromkeys(("local", "lost", "first", "starts", "last"), "*fp32:16")
    arguments["segments"] = "i32"
    known = {**dict.fromkeys(("K", "V"), 128), "HEADS": 16, "STATE_SHARE": 1, "REVERSE": False}
    return _row("linear_attention_scan_states", scan_states, arguments, {**known, "BLOCK": 1024}, 4, 1)


def _row(
    name: str, kernel: Any, arguments: dict[str, Kind | None], constexprs: dict[str, Any], warps: int, stages: int
) -> CompileRow:
    """Return the compilation with those of ``arguments`` that the kernel has; None becomes a constexpr."""
    mine = {name: kind for name, kind in arguments.items() if name in kernel.arg_names}
    signature = {name: kind for name, kind in mine.items() if kind is not None}
    known = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    return CompileRow(
        name, kernel, signature, {**known, **dict.fromkeys(mine.keys() - signature.keys())}, warps, stages
    )


def sweep_traffic(launch: ChunkLaunch, x: dict[str, Tensor], heads: int) -> Traffic:
    """Return the traffic bounds of a sweep: every byte once, except for tensors that several programs read.

    If a program needs all columns of a tensor, each program reads it: one per head that shares the tensor and per block
    of the columns that programs divide.

    Args:
        launch: the launch row.
        x: the kernel's tensors by name.
        heads: heads with a program each.
    """
    if launch.kernel == "sweep_values":
        blocks = -(-x["u"].shape[3] // launch.block_v)
        read = {"u": 1, **dict.fromkeys(("a", "w", "g", "hot"), blocks)}
        stored = ("y", "last", "hot")
    else:
        keys, values = (x["w"], x["u"]) if launch.kernel == "states" else (x["k"], x["v"])
        blocks, blocks_v = -(-keys.shape[3] // launch.block_k), -(-values.shape[3] // 64)
        if launch.kernel == "states":
            read, stored = {"u": blocks, "w": blocks_v, "g": blocks_v}, ("h", "hot", "last", "lost")
        else:  # the interpreter reads v and do twice; the compiler removes the second reading
            read = {**dict.fromkeys(("v", "do"), 2 * blocks), **dict.fromkeys(("q", "k", "g", "h", "hot"), 1)}
            stored = ("dq", "dk", "dg", "dfirst")
    loads = {
        name: times * heads / x[name].shape[2 if name != "hot" else 1] for name, times in read.items() if name in x
    }
    carried = {name: heads / x[name].shape[1] for name in ("first", "dlast") if name in x}
    return Traffic(1.0, {**loads, **carried}, {name: 1.0 for name in stored if name in x})
