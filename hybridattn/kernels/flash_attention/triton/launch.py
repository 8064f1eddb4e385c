"""Launch parameters of the softmax-attention kernels, by architecture, dims and dtype. Pure: needs neither Triton nor a
GPU."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.architectures import nearest_architecture, read_verified

MOST_DIM = 256  # of keys or values: a program holds whole rows
MOST_ROWS = 65535  # heads times rows of a batch: the second axis of a grid has no more
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TMA = ("sm_90", "sm_100")
Rows = dict[int, tuple[int, int, int, int]]

# (block_m, block_n, num_warps, num_stages) by the larger of the padded key and value dims: of 16-bit operands by
# architecture, and of fp32 operands, whose products take three passes of tf32 and twice the memory.
_SM_80: Rows = {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)}
_SM_90: Rows = {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)}
FORWARD: dict[str, Rows] = {
    "sm_80": _SM_80,
    "sm_90": _SM_90,
    "sm_100": {32: (128, 128, 8, 3), 64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "gfx942": {32: (128, 64, 4, 1), 64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
    "fp32": {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (32, 16, 8, 1)},
}
QUERY_GRADIENTS: dict[str, Rows] = {
    "sm_80": {32: (128, 64, 8, 2), 64: (128, 32, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "sm_90": {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "sm_100": {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "gfx942": {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
    "fp32": {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
}
KEY_GRADIENTS: dict[str, Rows] = {
    "sm_80": {32: (64, 128, 8, 2), 64: (32, 128, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    "sm_90": {32: (64, 128, 8, 3), 64: (64, 128, 8, 3), 128: (64, 128, 8, 3), 256: (64, 64, 8, 2)},
    "sm_100": {32: (64, 128, 8, 3), 64: (64, 128, 8, 3), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
    "gfx942": {32: (32, 64, 4, 1), 64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 32, 4, 1)},
    "fp32": {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
}
# (block_n, num_warps, num_stages, programs per multiprocessor), by dims and operands as above. Decoding is reading the
# caches: as many bytes are under way as shared memory has room for.
_DECODE: Rows = {32: (64, 4, 3, 4), 64: (64, 4, 3, 4), 128: (64, 4, 3, 2), 256: (32, 4, 3, 2)}
DECODE: dict[str, Rows] = {
    "sm_80": {32: (64, 4, 3, 4), 64: (64, 4, 3, 3), 128: (32, 4, 3, 3), 256: (32, 8, 2, 2)},
    "sm_90": _DECODE,
    "sm_100": _DECODE,
    "gfx942": {32: (64, 4, 1, 2), 64: (64, 4, 1, 2), 128: (64, 4, 1, 2), 256: (32, 4, 1, 2)},
    "fp32": {32: (64, 4, 2, 2), 64: (64, 4, 2, 2), 128: (16, 8, 2, 2), 256: (16, 8, 2, 2)},
}
DECODE_ROWS = (16, 32)  # of a tile of queries in decoding: more than the latter take several tiles

KERNELS = {"forward": FORWARD, "query_gradients": QUERY_GRADIENTS, "key_gradients": KEY_GRADIENTS}


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: tiles of ``block_m`` queries and ``block_n`` keys.

    A program of the forward and of the gradients of queries has one tile of queries and goes through tiles of keys; one
    of the gradients of keys and values the other way round.
    """

    kernel: str
    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool
    precision: str  # of products of fp32 operands: split into parts of 10 bits, or not
    verified: bool = False  # on the architecture asked for; else compiled only

    @property
    def name(self) -> str:
        dims = f"D{self.block_d} V{self.block_v} {self.block_m}x{self.block_n}"
        return f"flash_attention_{self.kernel} {dims} warps{self.num_warps} stages{self.num_stages}"


def attention_launch(kernel: str, architecture: str, key_dim: int, value_dim: int, bits: int) -> Launch:
    """Launch parameters of one kernel.

    Args:
        kernel: of KERNELS.
        architecture: such as "sm_90"; one without rows takes those of ``nearest_architecture``.
        key_dim, value_dim: D and V, 1 to 256.
        bits: of the operands, 16 or 32.
    """
    served = nearest_architecture(architecture)
    block_d, block_v = _padded(key_dim), _padded(value_dim)
    row = KERNELS[kernel][served if bits == 16 else "fp32"][max(block_d, block_v, 32)]
    precision = "ieee" if served == "gfx942" else "tf32x3"
    launch = Launch(kernel, row[0], row[1], block_d, block_v, row[2], row[3], served in HAS_TMA, precision)
    return replace(launch, verified=launch.name in read_verified(Path(__file__).parent).get(architecture, {}))


@dataclass(frozen=True)
class DecodeLaunch:
    """How ``decode_kernel`` is launched: ``programs`` per multiprocessor, tiles of ``block_m`` queries (of a group of
    heads together) and ``block_n`` keys."""

    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int
    programs: int
    precision: str
    verified: bool = False  # on the architecture asked for; else compiled only

    @property
    def name(self) -> str:
        dims = f"D{self.block_d} V{self.block_v} {self.block_m}x{self.block_n}"
        return f"flash_attention_decode {dims} warps{self.num_warps} stages{self.num_stages}"


def decode_launch(architecture: str, rows: int, key_dim: int, value_dim: int, bits: int) -> DecodeLaunch:
    """Launch parameters of decoding ``rows`` queries per key head, that is query heads of a group times new tokens;
    the rest as in ``attention_launch``.
    """
    served = nearest_architecture(architecture)
    block_d, block_v = _padded(key_dim), _padded(value_dim)
    block_m = DECODE_ROWS[rows > DECODE_ROWS[0]]
    row = DECODE[served if bits == 16 else "fp32"][max(block_d, block_v, 32)]
    precision = "ieee" if served == "gfx942" else "tf32x3"
    launch = DecodeLaunch(block_m, row[0], block_d, block_v, row[1], row[2], row[3], precision)
    return replace(launch, verified=launch.name in read_verified(Path(__file__).parent).get(architecture, {}))


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def decode_lacks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> str | None:
    """As ``lacks``, of decoding, which has no gradients here."""
    if torch.is_grad_enabled():
        for name, x in {"q": q, "k_cache": k, "v_cache": v, "sinks": sinks}.items():
            if x is not None and x.requires_grad:
                return f"{name}: expected a tensor without gradients, got requires_grad=True"
    return lacks(q, k, v)


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What keeps the kernels from serving a call whose shapes are right; None if nothing does."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype not in DTYPES:
            return f"{name}: expected float32, float16 or bfloat16, got {x.dtype}"
    for name, x in {"q": q, "v": v}.items():
        if not 1 <= x.shape[3] <= MOST_DIM:
            return f"{name}: expected a dim of 1 to {MOST_DIM}, got {x.shape[3]}"
    if (programs := q.shape[0] * q.shape[2]) > MOST_ROWS:
        return f"q: expected at most {MOST_ROWS} heads of all batch rows, got {programs}"
    return None
