"""Launch parameters of the softmax-attention kernels, by architecture, dims and dtype; needs no Triton and no GPU."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.architectures import nearest_architecture, read_verified

MOST_DIM = 256  # key or value dim: a program holds whole rows
MOST_ROWS = 65535  # heads times batch rows: the limit of CUDA for the second axis of a grid
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TMA = ("sm_90", "sm_100")
Rows = dict[int, tuple[int, int, int, int]]

# (block_m, block_n, num_warps, num_stages) by the larger of the padded key and value dims. The rows of an architecture
# are for 16-bit operands. The rows "fp32" are for fp32 operands, whose products take three tf32 passes and twice the
# memory.
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
# (block_n, num_warps, num_stages, programs per multiprocessor), by dims and operands as above. Reading caches limits
# decoding, so the rows keep as many loads in flight as shared memory can hold.
_DECODE: Rows = {32: (64, 4, 3, 4), 64: (64, 4, 3, 4), 128: (64, 4, 3, 2), 256: (32, 4, 3, 2)}
DECODE: dict[str, Rows] = {
    "sm_80": {32: (64, 4, 3, 4), 64: (64, 4, 3, 3), 128: (32, 4, 3, 3), 256: (32, 8, 2, 2)},
    "sm_90": _DECODE,
    "sm_100": _DECODE,
    "gfx942": {32: (64, 4, 1, 2), 64: (64, 4, 1, 2), 128: (64, 4, 1, 2), 256: (32, 4, 1, 2)},
    "fp32": {32: (64, 4, 2, 2), 64: (64, 4, 2, 2), 128: (16, 8, 2, 2), 256: (16, 8, 2, 2)},
}
DECODE_ROWS = (16, 32)  # queries of a tile in decoding; more than 32 take several tiles

KERNELS = {"forward": FORWARD, "query_gradients": QUERY_GRADIENTS, "key_gradients": KEY_GRADIENTS}


@dataclass(frozen=True)
class Launch:
    """Launch row of a kernel: tiles of ``block_m`` queries and ``block_n`` keys.

    A program of "forward" and "query_gradients" has one tile of queries and loops over tiles of keys. A program of
    "key_gradients" has one tile of keys and values and loops over tiles of queries.
    """

    kernel: str
    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int
    tma: bool
    precision: str  # products of fp32 operands: "tf32x3" (three tf32 products) or "ieee"
    verified: bool = False  # on the requested architecture; else compiled only

    @property
    def name(self) -> str:
        dims = f"D{self.block_d} V{self.block_v} {self.block_m}x{self.block_n}"
        return f"flash_attention_{self.kernel} {dims} warps{self.num_warps} stages{self.num_stages}"


def attention_launch(kernel: str, architecture: str, key_dim: int, value_dim: int, bits: int) -> Launch:
    """Return the launch row of a kernel.

    Args:
        kernel: a key of KERNELS.
        architecture: such as "sm_90"; one without rows uses those of ``nearest_architecture``.
        key_dim, value_dim: D and V, 1 to 256.
        bits: bits of an operand's element, 16 or 32.
    """
    nearest = nearest_architecture(architecture)
    block_d, block_v = _padded(key_dim), _padded(value_dim)
    row = KERNELS[kernel][nearest if bits == 16 else "fp32"][max(block_d, block_v, 32)]
    precision = "ieee" if nearest == "gfx942" else "tf32x3"
    launch = Launch(kernel, row[0], row[1], block_d, block_v, row[2], row[3], nearest in HAS_TMA, precision)
    return replace(launch, verified=launch.name in read_verified(Path(__file__).parent).get(architecture, {}))


@dataclass(frozen=True)
class DecodeLaunch:
    """Launch row of ``decode_kernel``: tiles of ``block_m`` queries and ``block_n`` keys.

    ``programs`` is the number of programs per multiprocessor. The queries of a tile are those of all heads that share a
    key head.
    """

    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int
    programs: int
    precision: str
    verified: bool = False  # on the requested architecture; else compiled only

    @property
    def name(self) -> str:
        dims = f"D{self.block_d} V{self.block_v} {self.block_m}x{self.block_n}"
        return f"flash_attention_decode {dims} warps{self.num_warps} stages{self.num_stages}"


def decode_launch(architecture: str, rows: int, key_dim: int, value_dim: int, bits: int) -> DecodeLaunch:
    """Return the launch row of decoding.

    Args:
        architecture, key_dim, value_dim, bits: as in ``attention_launch``.
        rows: queries per key head: query heads that share it times new tokens.
    """
    nearest = nearest_architecture(architecture)
    block_d, block_v = _padded(key_dim), _padded(value_dim)
    block_m = DECODE_ROWS[rows > DECODE_ROWS[0]]
    row = DECODE[nearest if bits == 16 else "fp32"][max(block_d, block_v, 32)]
    precision = "ieee" if nearest == "gfx942" else "tf32x3"
    launch = DecodeLaunch(block_m, row[0], block_d, block_v, row[1], row[2], row[3], precision)
    return replace(launch, verified=launch.name in read_verified(Path(__file__).parent).get(architecture, {}))


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def decode_lacks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> str | None:
    """Return ``lacks`` for decoding, which also does not support inputs that require gradients."""
    if torch.is_grad_enabled():
        for name, x in {"q": q, "k_cache": k, "v_cache": v, "sinks": sinks}.items():
            if x is not None and x.requires_grad:
                return f"{name}: expected a tensor without gradients, got requires_grad=True"
    return lacks(q, k, v)


def lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the kernels do not support valid inputs, as "argument: expected .., got .."; None if they do."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype not in DTYPES:
            return f"{name}: expected float32, float16 or bfloat16, got {x.dtype}"
    for name, x in {"q": q, "v": v}.items():
        if not 1 <= x.shape[3] <= MOST_DIM:
            return f"{name}: expected a dim of 1 to {MOST_DIM}, got {x.shape[3]}"
    if (programs := q.shape[0] * q.shape[2]) > MOST_ROWS:
        return f"q: expected at most {MOST_ROWS} heads times batch rows, got {programs}"
    return None
