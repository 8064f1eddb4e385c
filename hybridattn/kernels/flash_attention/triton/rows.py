"""What the kernels of softmax attention are held to: the rows that are compiled, and what a launch may move."""

from collections.abc import Iterator
from typing import Any

from ...runtime.launch import CompileRow
from . import operands
from .backward import key_gradients_kernel, query_gradients_kernel
from .forward import forward_kernel
from .launch import FORWARD, Launch, attention_launch

# Kinds of a call beside the usual one (causal, bf16, aligned).
KINDS: dict[str, dict[str, Any]] = {
    "full": {"RIGHT": None},
    "window": {"LEFT": 4095},
    "options": {"LEFT": 511, "SOFTCAP": True, "alibi_slopes": "*fp32:16", "sinks": "*bf16:16"},
    "blocks": {
        "BLOCK_SIZE": 128,
        "query_blocks": "*i32:16",
        **dict.fromkeys(("block_offsets", "key_blocks"), "*i64:16"),
    },
    "packed": {
        "PACKED": True,
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "*i64:16"),
        **dict.fromkeys(("tiles_sequence", "tiles_before"), "*i32:16"),
    },
    "fp16": {"dtype": "fp16"},
    "fp32": {"dtype": "fp32"},
}
ATTENTION_KERNELS = {
    "forward": forward_kernel,
    "query_gradients": query_gradients_kernel,
    "key_gradients": key_gradients_kernel,
}


def compile_rows(architecture: str) -> Iterator[CompileRow]:
    """Every launch row of an architecture, and at dims of 128 every kind of call."""
    for kernel in ATTENTION_KERNELS:
        for dim in FORWARD[architecture]:
            yield _attention_row(kernel, architecture, dim, "", {})
        for kind, changes in KINDS.items():
            yield _attention_row(kernel, architecture, 128, " " + kind, changes)


def _attention_row(name: str, architecture: str, dim: int, kind: str, changes: dict[str, Any]) -> CompileRow:
    kernel, dtype = ATTENTION_KERNELS[name], changes.get("dtype", "bf16")
    launch = attention_launch(name, architecture, dim, dim, 32 if dtype == "fp32" else 16)
    arguments = {
        **dict.fromkeys(("o", "dq", "dk", "dv"), f"*{dtype}:16"),
        **dict.fromkeys(("lse", "dlse", "shift", "delta"), "*fp32:16"),
        **dict.fromkeys(("scale", "softcap", "outer_scale"), "fp32"),
        **dict.fromkeys(("queries", "keys"), "i32:16"),
        **{f"{x}_{of}": "i32:16" for x in ("q", "k", "v", "do") for of in ("batch", "time", "head")},
        **_operands(launch, dtype),
        **changes,
    }
    constexprs = {
        **operands.constexprs(launch, dim, dim),
        "HEADS": 32,
        "GROUP": 4,
        "LEFT": None,
        "RIGHT": 0,
        "SOFTCAP": False,
        "BLOCK_SIZE": None,
        "PACKED": False,
        **{name: value for name, value in changes.items() if name.isupper()},
    }
    signature = {name: arguments[name] for name in kernel.arg_names if name in arguments and name not in constexprs}
    absent = dict.fromkeys(set(kernel.arg_names) - signature.keys() - constexprs.keys())
    return CompileRow(launch.name + kind, kernel, signature, constexprs | absent, launch.num_warps, launch.num_stages)


def _operands(launch: Launch, dtype: str) -> dict[str, str]:
    """Types of q, k, v and do."""
    types: dict[str, str] = dict.fromkeys(("q", "k", "v", "do"), f"*{dtype}:16")
    if launch.tma:
        tiles = operands.visited_tiles(launch)
        types |= {name: f"tensordesc<{dtype}[1,{rows},1,{columns}]>" for name, (rows, columns) in tiles.items()}
    return types
