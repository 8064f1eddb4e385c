"""Compilations that the softmax-attention kernels are checked with: launch rows with their argument types."""

from collections.abc import Iterator
from typing import Any

from ...runtime.architectures import CompileRow
from . import operands
from .backward import key_gradients_kernel, query_gradients_kernel
from .decode import decode_constexprs, decode_kernel, merge_kernel
from .forward import forward_kernel
from .launch import DECODE_ROWS, FORWARD, DecodeLaunch, Launch, attention_launch, decode_launch

# Variants of a call besides the default (causal, bf16, aligned): arguments and constexprs that differ.
KINDS: dict[str, dict[str, Any]] = {
    "full": {"RIGHT": None},
    "window": {"LEFT": 4095},
    "options": {"LEFT": 511, "SOFTCAP": True, "alibi_slopes": "*fp32:16", "sinks": "*bf16:16", "dsinks": "*fp32:16"},
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
    """Yield every launch row of an architecture, and the variants of a call at dims of 128.

    Also the smallest dims (16) and key and value dims that differ.
    """
    for kernel in ATTENTION_KERNELS:
        for dim in FORWARD[architecture]:
            yield _attention_row(kernel, architecture, dim, "", {})
            if dim != 128:
                yield _attention_row(kernel, architecture, dim, " fp32", {"dtype": "fp32"})
        yield _attention_row(kernel, architecture, 16, "", {})
        for value_dim in (64, 256):
            yield _attention_row(kernel, architecture, 128, "", {}, value_dim)
        for kind, changes in KINDS.items():
            yield _attention_row(kernel, architecture, 128, " " + kind, changes)
    for rows in DECODE_ROWS:
        for dim in (16, *FORWARD[architecture]):
            yield _decode_row(architecture, rows, dim, "", {})
            if dim != 128:
                yield _decode_row(architecture, rows, dim, " fp32", {"dtype": "fp32"})
        for kind in ("window", "options", "fp16", "fp32"):
            yield _decode_row(architecture, rows, 128, " " + kind, KINDS[kind])
    for dim in (16, *FORWARD[architecture]):
        launch = decode_launch(architecture, DECODE_ROWS[0], dim, dim, 16)
        name = f"flash_attention_merge V{launch.block_v} {launch.block_m} warps{launch.num_warps}"
        yield _row(name, merge_kernel, "bf16", {}, _decode_constexprs(launch, dim), launch.num_warps, 1)


def _attention_row(
    name: str, architecture: str, dim: int, kind: str, changes: dict[str, Any], value_dim: int | None = None
) -> CompileRow:
    dtype = changes.get("dtype", "bf16")
    launch = attention_launch(name, architecture, dim, value_dim or dim, 32 if dtype == "fp32" else 16)
    constexprs = {
        **operands.constexprs(launch, dim, value_dim or dim),
        "HEADS": 32,
        "GROUP": 4,
        "LEFT": None,
        "RIGHT": 0,
        "SOFTCAP": False,
        "BLOCK_SIZE": None,
        "PACKED": False,
    }
    changes = _operands(launch, dtype) | changes
    kernel = ATTENTION_KERNELS[name]
    return _row(launch.name + kind, kernel, dtype, changes, constexprs, launch.num_warps, launch.num_stages)


def _decode_row(architecture: str, rows: int, dim: int, kind: str, changes: dict[str, Any]) -> CompileRow:
    dtype = changes.get("dtype", "bf16")
    launch = decode_launch(architecture, rows, dim, dim, 32 if dtype == "fp32" else 16)
    constexprs = _decode_constexprs(launch, dim)
    return _row(launch.name + kind, decode_kernel, dtype, changes, constexprs, launch.num_warps, launch.num_stages)


def _decode_constexprs(launch: DecodeLaunch, dim: int) -> dict[str, Any]:
    return {
        **decode_constexprs(launch, dim, dim),
        "HEADS": 32,
        "GROUP": launch.block_m // 4,
        "NEW": 4,
        "LEFT": None,
        "SOFTCAP": False,
        "BLOCK_B": 64,
    }


def _row(
    name: str, kernel: Any, dtype: str, changes: dict[str, Any], constexprs: dict[str, Any], warps: int, stages: int
) -> CompileRow:
    """Return a compilation with the default arguments, updated by ``changes``; all other arguments are None."""
    arguments = {
        **dict.fromkeys(("q", "k", "v", "do", "o", "dq", "dk", "dv"), f"*{dtype}:16"),
        **dict.fromkeys(("lse", "dlse", "shift", "delta", "sums", "tops", "totals"), "*fp32:16"),
        **dict.fromkeys(("scale", "softcap", "outer_scale"), "fp32"),
        **dict.fromkeys(("queries", "keys"), "i32:16"),
        **dict.fromkeys(("batches", "slots", "programs"), "i32"),
        "lengths": "*i64:16",
        **{f"{x}_{of}": "i32:16" for x in ("q", "k", "v", "do") for of in ("batch", "time", "head")},
        **changes,
    }
    constexprs = {key: changes.get(key, value) for key, value in constexprs.items() if key in kernel.arg_names}
    signature = {key: arguments[key] for key in kernel.arg_names if key in arguments and key not in constexprs}
    absent = dict.fromkeys(set(kernel.arg_names) - signature.keys() - constexprs.keys())
    return CompileRow(name, kernel, signature, constexprs | absent, warps, stages)


def _operands(launch: Launch, dtype: str) -> dict[str, str]:
    """Return the types of those of q, k, v and do that the kernel reads through descriptors."""
    if not launch.tma:
        return {}
    tiles = operands.visited_tiles(launch)
    return {name: f"tensordesc<{dtype}[1,{rows},1,{columns}]>" for name, (rows, columns) in tiles.items()}
