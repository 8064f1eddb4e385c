"""Launch parameters of the linear-attention kernels, by architecture and dims. Pure: needs neither Triton nor a GPU."""

from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.architectures import architecture, nearest_architecture, read_verified

MOST_TOKENS = 8  # of one step: beyond, a chunk's matrix products are the faster way
MOST_KEY_DIM = 1024  # a program holds all keys of some value columns of the state
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (block_v, num_warps) by block_k: 16 to 64 registers of state per thread, and rows of 64 bytes or more.
_NVIDIA = {16: (128, 4), 32: (128, 4), 64: (64, 4), 128: (32, 4), 256: (32, 4), 512: (16, 4), 1024: (16, 8)}
STEP = {
    "sm_80": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    "gfx942": {block_k: (block_v, warps // 2) for block_k, (block_v, warps) in _NVIDIA.items()},  # warps of 64
}


@dataclass(frozen=True)
class StepLaunch:
    """How ``step_kernel`` is launched: one program per head of the state and ``block_v`` of its columns."""

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    verified: bool  # on the architecture asked for; else compiled only

    @property
    def name(self) -> str:
        return f"linear_attention_step K{self.block_k} V{self.block_v} warps{self.num_warps}"


def step_launch(architecture: str, key_dim: int) -> StepLaunch:
    """Launch parameters of a step.

    Args:
        architecture: such as "sm_90"; one without rows takes those of ``nearest_architecture``.
        key_dim: K, 1 to 1024. The value dim and the operands' dtypes do not matter: the state's fp32 tile decides.
    """
    block_k = max(16, 1 << (key_dim - 1).bit_length())
    block_v, num_warps = STEP[nearest_architecture(architecture)][block_k]
    launch = StepLaunch(block_k, block_v, num_warps, 1, False)
    verified = launch.name in read_verified(Path(__file__).parent).get(architecture, {})
    return StepLaunch(block_k, block_v, num_warps, 1, verified)


def step_lacks(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> str | None:
    """What keeps the kernel from serving a step whose shapes are right; None if nothing does."""
    for name, x in {"q": q, "k": k, "v": v, "g": g}.items():
        if x is not None and x.dtype not in DTYPES:
            return f"{name}: expected float32, float16 or bfloat16, got {x.dtype}"
    if state.dtype != torch.float32:
        return f"state: expected float32, got {state.dtype}"
    if q.shape[1] > MOST_TOKENS:
        return f"q: expected at most {MOST_TOKENS} tokens, got {q.shape[1]}"
    if q.shape[3] > MOST_KEY_DIM:
        return f"q: expected a key dim of at most {MOST_KEY_DIM}, got {q.shape[3]}"
    return None


# ------------------------------------------------------------------------------------------------------- chunked sweeps
MOST_CHUNK_KEY_DIM = 256  # a program holds all keys of some value columns of the state
MOST_CHUNK_VALUE_DIM = 512

# (columns, num_warps, num_stages) by what operands of products are. Of ``sweep_values``: columns of values, by K at
# most. A state in fp32 and three products for one leave fp32 without a row where registers or tensor memory are short.
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
    "sm_100": {  # Triton 3.7.1 cannot pipeline a loop with a store by descriptor there
        "bf16": {64: (64, 4, 1), 128: (64, 8, 1), 256: (32, 4, 1)},
        "fp16": {64: (32, 4, 1), 128: (32, 4, 1), 256: (32, 4, 1)},
    },
    "gfx942": {
        "bf16": {64: (64, 4, 1), 128: (64, 4, 1), 256: (32, 4, 1)},
        "fp16": {64: (64, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
        "fp32": {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
    },
}
# Of ``sweep_keys``: columns of keys, by V at most; more values than the table has go in several launches.
KEYS = {
    "sm_80": {"bf16": {128: (16, 4, 2)}, "fp16": {128: (16, 4, 1)}},
    "sm_90": {"bf16": {128: (32, 4, 2), 256: (16, 4, 2)}, "fp16": {128: (16, 4, 1)}, "fp32": {128: (16, 4, 1)}},
    "sm_100": {"bf16": {128: (32, 4, 1)}, "fp16": {128: (16, 4, 1)}},
    "gfx942": {"bf16": {128: (32, 4, 1)}, "fp16": {128: (16, 4, 1)}, "fp32": {64: (16, 4, 1)}},
}
STATES = {"sm_80": (4, 2), "sm_90": (4, 2), "sm_100": (4, 1), "gfx942": (4, 1)}  # num_warps, num_stages


@dataclass(frozen=True)
class ChunkLaunch:
    """How a sweep over chunks is launched: one program per sequence, head and some of the columns."""

    kernel: str
    operands: str  # "bf16", "fp16" or "fp32"
    most: int  # of the dim that a program holds all of: of keys for ``sweep_values``, of values for ``sweep_keys``
    block_k: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool
    verified: bool

    @property
    def name(self) -> str:
        dims = f"K{self.most} V{self.block_v}" if self.kernel == "sweep_values" else f"K{self.block_k} V{self.most}"
        return f"linear_attention_{self.kernel} {dims} {self.operands} warps{self.num_warps}"


def chunk_launch(kernel: str, architecture: str, key_dim: int, value_dim: int, operands: str) -> ChunkLaunch:
    """Launch parameters of a sweep.

    Args:
        kernel: "sweep_values", "sweep_keys" or "states".
        architecture: such as "sm_90"; one without rows takes those of ``nearest_architecture``.
        key_dim, value_dim: K, 1 to 256, and V, 1 to 512. A row of ``sweep_keys`` may serve fewer values at a time.
        operands: "bf16", "fp16" or "fp32", for which ``chunk_lacks`` found nothing.
    """
    served = nearest_architecture(architecture)
    block_k, block_v = tile_columns(key_dim), tile_columns(value_dim)
    if kernel == "states":
        most, (num_warps, num_stages) = 64, STATES[served]
    elif kernel == "sweep_keys":
        rows = KEYS[served][operands]
        most = min((most for most in rows if value_dim <= most), default=max(rows))
        columns, num_warps, num_stages = rows[most]
        block_k = min(block_k, columns)
    else:
        rows = VALUES[served][operands]
        most = min(most for most in rows if key_dim <= most)
        columns, num_warps, num_stages = rows[most]
        block_v = min(block_v, columns)
    tma = served in ("sm_90", "sm_100")
    row = ChunkLaunch(kernel, operands, most, block_k, block_v, num_warps, num_stages, tma, False)
    return replace(row, verified=row.name in read_verified(Path(__file__).parent).get(architecture, {}))


def operand_name(*tensors: Tensor) -> str:
    """What operands of these tensors' products are: "bf16", "fp16" or "fp32"."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


def segments(programs: int, chunks: int, processors: int) -> int:
    """How many segments a sequence is split in: one, unless there are fewer programs than processors.

    Then as many as give each processor two, but segments of 4 chunks at least: their states are work of their own.
    """
    return 1 if programs >= processors else max(1, min(-(-2 * processors // programs), chunks // 4))


def tile_columns(dim: int) -> int:
    """Columns of a tile: a power of two from 16 to 64."""
    return max(16, min(64, 1 << (dim - 1).bit_length()))


def chunk_lacks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, rows: int | None = None
) -> str | None:
    """What keeps the kernels from serving a sequence whose shapes are right; None if nothing does.

    ``rows`` are those of the state, K unless keys have features.
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
