"""Launch parameters of the linear-attention kernels, by architecture and dims. Pure: needs neither Triton nor a GPU."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.launch import nearest_architecture, read_verified

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
