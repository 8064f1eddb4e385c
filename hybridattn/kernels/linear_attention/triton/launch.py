"""Launch parameters of the linear-attention kernels, by architecture and dims; needs neither Triton nor a GPU."""

from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.architectures import architecture, nearest_architecture, read_verified

MOST_TOKENS = 8  # of one step; for more tokens the matrix products of the chunked operator are faster
MOST_DELTA_TOKENS = 16  # the same limit for the delta rule
MOST_KEY_DIM = 1024  # a program holds all K rows of its value columns of the state
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (block_v, num_warps) by block_k: the state takes 16 to 64 registers per thread, and its rows 64 bytes or more. A warp
# has 32 threads on NVIDIA GPUs and 64 on AMD GPUs.
_NVIDIA = {16: (128, 4), 32: (128, 4), 64: (64, 4), 128: (32, 4), 256: (32, 4), 512: (16, 4), 1024: (16, 8)}
STEP = {
    "sm_80": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    "gfx942": {block_k: (block_v, warps // 2) for block_k, (block_v, warps) in _NVIDIA.items()},  # 64 per warp
}


@dataclass(frozen=True)
class StepLaunch:
    """Launch row of ``step_kernel``: one program per head of the state and ``block_v`` of its columns."""

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    verified: bool  # on the requested architecture; else compiled only

    @property
    def name(self) -> str:
        return f"linear_attention_step K{self.block_k} V{self.block_v} warps{self.num_warps}"


def step_launch(architecture: str, key_dim: int) -> StepLaunch:
    """Return the launch row of a step.

    Args:
        architecture: such as "sm_90"; one without rows uses those of ``nearest_architecture``.
        key_dim: K, 1 to 1024. The value dim and the operands' dtypes do not matter: the state's fp32 tile decides.
    """
    block_k = max(16, 1 << (key_dim - 1).bit_length())
    block_v, num_warps = STEP[nearest_architecture(architecture)][block_k]
    launch = StepLaunch(block_k, block_v, num_warps, 1, False)
    verified = launch.name in read_verified(Path(__file__).parent).get(architecture, {})
    return StepLaunch(block_k, block_v, num_warps, 1, verified)


def step_lacks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, beta: Tensor | None = None
) -> str | None:
    """Return why the kernel does not support a step of valid shapes, as "argument: expected .., got .."; else None.

    ``beta`` is the strength of writing of the delta rule, None for linear attention.
    """
    most = MOST_TOKENS if beta is None else MOST_DELTA_TOKENS
    for name, x in {"q": q, "k": k, "v": v, "g": g, "beta": beta}.items():
        if x is not None and x.dtype not in DTYPES:
            return f"{name}: expected float32, float16 or bfloat16, got {x.dtype}"
    if state.dtype != torch.float32:
        return f"state: expected float32, got {state.dtype}"
    if q.shape[1] > most:
        return f"q: expected at most {most} tokens, got {q.shape[1]}"
    if q.shape[3] > MOST_KEY_DIM:
        return f"q: expected a key dim of at most {MOST_KEY_DIM}, got {q.shape[3]}"
    return None


# ------------------------------------------------------------------------------------------------------- chunked sweeps
MOST_CHUNK_KEY_DIM = 256  # a program holds all K rows of its value columns of the state
MOST_CHUNK_VALUE_DIM = 512

# ``sweep_values``: (value columns of a program, num_warps, num_stages), by architecture, operand type and largest K.
# fp32 has no rows on sm_80 and sm_100: its state and its products, three of tf32 each, exceed the registers or the
# tensor memory there.
VALUES = {
    "sm_80": {
        "bf16": {64: (64, 4, 2), 128: (64, 8, 2), 256: (32, 8, 1)},
        "fp16": {64: (64, 4, 1), 128: (32, 4, 1), 256: (32, 8, 1)},
    },
    "sm_90": {
        "bf16": {64: (64, 4, 2), 128: (64, 4, 2), 192: (64, 8, 2), 256: (32, 4, 2)},
        "fp16": {64: (64, 4, 1), 128: (32, 4, 2), 256: (32, 4, 1)},
        "fp32": {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
    },
    "sm_100": {  # Triton 3.7.1 cannot pipeline a loop that stores by descriptor on sm_100
        "bf16": {64: (64, 4, 1), 128: (64, 8, 1), 256: (32, 4, 1)},
        "fp16": {64: (32, 4, 1), 128: (32, 4, 1), 256: (32, 4, 1)},
    },
    "gfx942": {
        "bf16": {64: (64, 4, 1), 128: (64, 4, 1), 256: (32, 4, 1)},
        "fp16": {64: (64, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
        "fp32": {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
    },
}
# ``sweep_keys``: (key columns of a program, num_warps, num_stages), by architecture, operand type and largest V. Values
# beyond the largest V are split over several launches.
KEYS = {
    "sm_80": {"bf16": {128: (16, 4, 2)}, "fp16": {128: (16, 4, 1)}},
    "sm_90": {"bf16": {128: (32, 4, 2), 256: (16, 4, 2)}, "fp16": {128: (16, 4, 1)}, "fp32": {128: (16, 4, 1)}},
    "sm_100": {"bf16": {128: (32, 4, 1)}, "fp16": {128: (16, 4, 1)}},
    "gfx942": {"bf16": {128: (32, 4, 1)}, "fp16": {128: (16, 4, 1)}, "fp32": {64: (16, 4, 1)}},
}
# ``sweep_delta`` and ``sweep_gradients``: as ``VALUES``. With 64 value columns a program of ``sweep_delta`` for K = 128
# and a gate per head has 418 spill instructions on sm_90, with 32 none.
DELTA = {
    "sm_80": {"bf16": {128: (32, 4, 1)}},
    "sm_90": {
        "bf16": {64: (32, 4, 1), 128: (32, 4, 1), 256: (32, 8, 1)},
        "fp16": {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 8, 1)},
        "fp32": {64: (16, 4, 1), 128: (16, 4, 1), 256: (16, 8, 1)},
    },
    "sm_100": {},  # Triton 3.7.1 does not compile ``solve_chunks`` for sm_100
    "gfx942": {"bf16": {128: (32, 4, 1)}},
}
STATES = {"sm_80": (4, 2), "sm_90": (4, 2), "sm_100": (4, 1), "gfx942": (4, 1)}  # num_warps, num_stages


@dataclass(frozen=True)
class ChunkLaunch:
    """Launch row of a sweep over chunks: one program per sequence, head and block of columns."""

    kernel: str
    operands: str  # "bf16", "fp16" or "fp32"
    most: int  # largest size of the dim that a program holds whole: K for ``sweep_values``, V for ``sweep_keys``
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool
    verified: bool

    @property
    def name(self) -> str:
        whole_k = self.kernel not in ("sweep_keys", "states")
        dims = f"K{self.most} V{self.block_v}" if whole_k else f"K{self.block_k} V{self.most}"
        return f"linear_attention_{self.kernel} {dims} {self.operands} warps{self.num_warps}"


def chunk_launch(kernel: str, architecture: str, key_dim: int, value_dim: int, operands: str) -> ChunkLaunch:
    """Return the launch row of a sweep.

    Args:
        kernel: "sweep_values", "sweep_keys", "states"; of the delta rule "sweep_delta" or "sweep_gradients".
        architecture: such as "sm_90"; one without rows uses those of ``nearest_architecture``.
        key_dim, value_dim: K, 1 to 256, and V, 1 to 512. A row of ``sweep_keys`` may take fewer values per launch.
        operands: "bf16", "fp16" or "fp32"; ``chunk_lacks`` or ``delta_lacks`` has to be None for it.
    """
    nearest = nearest_architecture(architecture)
    block_k, block_v = tile_columns(key_dim), tile_columns(value_dim)
    if kernel == "states":
        most, (num_warps, num_stages) = 64, STATES[nearest]
    elif kernel == "sweep_keys":
        rows = KEYS[nearest][operands]
        most = min((most for most in rows if value_dim <= most), default=max(rows))
        columns, num_warps, num_stages = rows[most]
        block_k = min(block_k, columns)
    else:
        rows = (VALUES if kernel == "sweep_values" else DELTA)[nearest][operands]
        most = min(most for most in rows if key_dim <= most)
        columns, num_warps, num_stages = rows[most]
        block_v = min(block_v, columns)
    tma = nearest in ("sm_90", "sm_100")
    row = ChunkLaunch(kernel, operands, most, block_k, block_v, num_warps, num_stages, tma, False)
    return replace(row, verified=row.name in read_verified(Path(__file__).parent).get(architecture, {}))


def operand_name(*tensors: Tensor) -> str:
    """Return the operand type of products of these tensors: "bf16", "fp16" or "fp32"."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


def segments(programs: int, chunks: int, processors: int) -> int:
    """Return how many segments a sequence is split into: one, unless there are fewer programs than processors.

    Then the number gives each processor two programs, but a segment has at least 4 chunks, since computing its state is
    additional work.
    """
    return 1 if programs >= processors else max(1, min(-(-2 * processors // programs), chunks // 4))


def tile_columns(dim: int) -> int:
    """Return the columns of a tile: a power of two from 16 to 64."""
    return max(16, min(64, 1 << (dim - 1).bit_length()))


def chunk_lacks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, rows: int | None = None
) -> str | None:
    """Return why the kernels do not support valid inputs, as "argument: expected .., got .."; None if they do.

    ``rows`` is the number of rows of the state; K by default, P with Taylor features.
    """
    for name, x in {"q": q, "k": k, "v": v, "g": g}.items():
        if x is not None and x.dtype not in DTYPES:
            return f"{name}: expected float32, float16 or bfloat16, got {x.dtype}"
    if state is not None and state.dtype != torch.float32:
        return f"initial_state: expected float32, got {state.dtype}"
    if (rows := rows or k.shape[3]) > MOST_CHUNK_KEY_DIM:
        return f"k: expected a key dim of at most {MOST_CHUNK_KEY_DIM}, got {rows}"
    if v.shape[3] > MOST_CHUNK_VALUE_DIM:
        return f"v: expected a value dim of at most {MOST_CHUNK_VALUE_DIM}, got {v.shape[3]}"
    name = nearest_architecture(architecture(q.device))
    if (operands := operand_name(q, k, v)) not in VALUES[name]:
        return f"q: expected 16-bit operands on {name}, got {operands}"
    return None


def delta_lacks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor | None, normalize: bool
) -> str | None:
    """Return why the kernels of the delta rule do not support valid inputs, as ``chunk_lacks``."""
    if (lacks := chunk_lacks(q, k, v, g, state)) is not None:
        return lacks
    if beta.dtype not in DTYPES:
        return f"beta: expected float32, float16 or bfloat16, got {beta.dtype}"
    name, operands = nearest_architecture(architecture(q.device)), operand_name(q, k, v)
    if operands not in DELTA[name]:
        return f"q: expected {' or '.join(DELTA[name]) or 'no delta rule'} on {name}, got {operands}"
    if k.shape[3] > (most := max(DELTA[name][operands])):
        return f"k: expected a key dim of at most {most}, got {k.shape[3]}"
    return None
