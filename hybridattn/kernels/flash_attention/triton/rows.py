"""What the kernels of softmax attention are held to: the rows that are compiled, and what a launch may move."""

from collections.abc import Iterator
from typing import Any

from ...runtime.launch import CompileRow
from .forward import forward_constexprs, forward_kernel
from .launch import FORWARD, ForwardLaunch, forward_launch

STRIDES = [f"{x}_{dim}" for x in "qkv" for dim in ("batch", "time", "head")]

# Kinds of a call beside the usual one (causal, bf16, aligned).
KINDS: dict[str, dict[str, Any]] = {
    "full": {"RIGHT": None},
    "window": {"LEFT": 4095},
    "options": {"LEFT": 511, "SOFTCAP": True, "alibi_slopes": "*fp32:16", "sinks": "*bf16:16"},
    "blocks": {"BLOCK_SIZE": 128, "block_offsets": "*i64:16", "key_blocks": "*i64:16"},
    "packed": {"PACKED": True},
    "fp16": {"dtype": "fp16"},
    "fp32": {"dtype": "fp32"},
}


def compile_rows(architecture: str) -> Iterator[CompileRow]:
    """Every launch row of an architecture, and at dims of 128 every kind of call."""
    for dim in FORWARD[architecture]:
        yield _forward_row(architecture, dim, "", {})
    for kind, changes in KINDS.items():
        yield _forward_row(architecture, 128, " " + kind, changes)


def _forward_row(architecture: str, dim: int, kind: str, changes: dict[str, Any]) -> CompileRow:
    dtype = changes.get("dtype", "bf16")
    launch = forward_launch(architecture, dim, dim, 32 if dtype == "fp32" else 16)
    packed = "*i64:16" if changes.get("PACKED") else None
    arguments = {
        **_operands(launch, dtype),
        **dict.fromkeys(("alibi_slopes", "sinks", "block_offsets", "key_blocks"), None),
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), packed),
        **dict.fromkeys(("tiles_sequence", "tiles_before"), packed and "*i32:16"),
        "o": f"*{dtype}:16",
        "lse": "*fp32:16",
        "scale": "fp32",
        "softcap": "fp32",
        "queries": "i32:16",
        "keys": "i32:16",
        **dict.fromkeys(STRIDES, "i32:16"),
        **{name: value for name, value in changes.items() if name.islower()},
    }
    constexprs = {
        **forward_constexprs(launch, dim, dim),
        "HEADS": 32,
        "GROUP": 4,
        "LEFT": None,
        "RIGHT": 0,
        "SOFTCAP": False,
        "BLOCK_SIZE": None,
        "PACKED": False,
        **{name: value for name, value in changes.items() if name.isupper()},
    }
    known = forward_kernel.arg_names
    signature = {name: kind for name, kind in arguments.items() if kind is not None and name in known}
    constexprs |= {name: None for name, kind in arguments.items() if kind is None}
    return CompileRow(launch.name + kind, forward_kernel, signature, constexprs, launch.num_warps, launch.num_stages)


def _operands(launch: ForwardLaunch, dtype: str) -> dict[str, str]:
    """Types of q, k and v."""
    if not launch.tma:
        return dict.fromkeys("qkv", f"*{dtype}:16")
    tiles = {
        "q": (launch.block_m, launch.block_d),
        "k": (launch.block_n, launch.block_d),
        "v": (launch.block_n, launch.block_v),
    }
    return {name: f"tensordesc<{dtype}[1,{rows},1,{columns}]>" for name, (rows, columns) in tiles.items()}
