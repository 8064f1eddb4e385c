"""Launch parameters of the softmax-attention kernels, by architecture, dims and dtype. Pure: needs neither Triton nor a
GPU."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.launch import nearest_architecture, read_verified

MOST_DIM = 256  # of keys or values: a program holds whole rows
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (block_m, block_n, num_warps, num_stages) by the larger of the padded key and value dims, of 16-bit operands.
_SM_90 = {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)}
_SM_80 = {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)}
FORWARD = {
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    "sm_100": {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    "gfx942": {32: (128, 64, 4, 1), 64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
}
# Of fp32 operands, whose products take three passes of tf32 and twice the memory.
FORWARD_FP32 = {32: (64, 32, 4, 2), 64: (64, 16, 4, 2), 128: (32, 16, 4, 2), 256: (32, 16, 8, 1)}
HAS_TMA = ("sm_90", "sm_100")


@dataclass(frozen=True)
class ForwardLaunch:
    """How ``forward_kernel`` is launched: one program per head and ``block_m`` queries, ``block_n`` keys at a time."""

    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool
    precision: str  # of products of fp32 operands: split into parts of 10 bits, or not
    verified: bool  # on the architecture asked for; else compiled only

    @property
    def name(self) -> str:
        dims = f"D{self.block_d} V{self.block_v} {self.block_m}x{self.block_n}"
        return f"flash_attention_forward {dims} warps{self.num_warps} stages{self.num_stages}"


def forward_launch(architecture: str, key_dim: int, value_dim: int, bits: int) -> ForwardLaunch:
    """Launch parameters of the forward pass.

    Args:
        architecture: such as "sm_90"; one without rows takes those of ``nearest_architecture``.
        key_dim, value_dim: D and V, 1 to 256.
        bits: of the operands, 16 or 32.
    """
    served = nearest_architecture(architecture)
    block_d, block_v = (max(16, 1 << (dim - 1).bit_length()) for dim in (key_dim, value_dim))
    table = FORWARD[served] if bits == 16 else FORWARD_FP32
    tma = served in HAS_TMA
    row = table[max(block_d, block_v, 32)]
    launch = ForwardLaunch(
        row[0], row[1], block_d, block_v, row[2], row[3], tma, "ieee" if served == "gfx942" else "tf32x3", False
    )
    verified = launch.name in read_verified(Path(__file__).parent).get(architecture, {})
    return ForwardLaunch(**{**launch.__dict__, "verified": verified})


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What keeps the kernels from serving a call whose shapes are right; None if nothing does."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype not in DTYPES:
            return f"{name}: expected float32, float16 or bfloat16, got {x.dtype}"
    for name, x in {"q": q, "v": v}.items():
        if not 1 <= x.shape[3] <= MOST_DIM:
            return f"{name}: expected a dim of 1 to {MOST_DIM}, got {x.shape[3]}"
    return None
