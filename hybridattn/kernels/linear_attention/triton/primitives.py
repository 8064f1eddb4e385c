"""What the chunk kernels share: where a sequence lies, tiles of 64 tokens, sums of gates, operands of products.

B batch, T time, N sequences, D columns; a tile is [64 tokens, BLOCK columns]. A tensor [B,T,heads,D] comes as a TMA
descriptor with blocks [1,64,1,BLOCK], or as a tuple (pointer, strides of batch, time and head); its columns are dense.

Gates are summed as products with constant 0/1 matrices: exact in fp32 for any gates, and never as a difference of large
running sums, which would lose the small gates that follow a large one.
"""

# pyright: reportGeneralTypeIssues=false
# It takes jit functions for ones that never return.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-200.0)  # exp(FLOOR) is 0 in fp32; a finite stand-in for -inf, exact in 16 bits
COOL = tl.constexpr(-86.0)  # bits that a channel may lose in a chunk before it is hot: see ``forward``


@triton.jit
def find_sequence(cu_seqlens, n, T, segments):
    """Row of the batch, first token, token past the last, and first slot of sequence n.

    Slots number the chunks of all sequences: N * cdiv(T, 64) of them, or T // 64 + N of a packed row, with gaps. With
    ``segments``, n counts those of all sequences: each has so many, of whole chunks, equal but for the last ones.
    """
    part, n = n % segments, n // segments
    if cu_seqlens is None:
        batch, first, end, slot = n, 0, T, n * tl.cdiv(T, 64)
    else:
        first = tl.load(cu_seqlens + n).to(tl.int32)
        batch, end, slot = 0, tl.load(cu_seqlens + n + 1).to(tl.int32), first // 64 + n
    if segments > 1:
        chunks = tl.cdiv(tl.cdiv(end - first, 64), segments)
        slot += part * chunks
        first = tl.minimum(first + part * chunks * 64, end)
        end = tl.minimum(first + chunks * 64, end)
    return batch, first, end, slot


@triton.jit
def load_tile(x, batch, row, head, column, end, D, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Tile of x from token ``row`` and column ``column``; zeros from token ``end`` and column D on.

    A descriptor ends where its tensor does: ``end`` has to be T.
    """
    if TMA:
        tile = x.load([batch, head, row, column]).reshape(64, BLOCK)
    else:
        addresses, inside = _addresses(x, batch, row, head, column, end, D, BLOCK)
        tile = tl.load(addresses, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(x, value, batch, row, head, column, end, D, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Tile to the place that ``load_tile`` would load it from, in the tensor's dtype."""
    if TMA:
        x.store([batch, head, row, column], value.to(x.dtype).reshape(1, 1, 64, BLOCK))
    else:
        addresses, inside = _addresses(x, batch, row, head, column, end, D, BLOCK)
        tl.store(addresses, value.to(x[0].dtype.element_ty), mask=inside)


@triton.jit
def _addresses(x, batch, row, head, column, end, D, BLOCK: tl.constexpr):
    t, c = tl.arange(0, 64)[:, None], column + tl.arange(0, BLOCK)[None, :]
    corner = x[0] + tl.cast(batch, tl.int64) * x[1] + tl.cast(row, tl.int64) * x[2] + tl.cast(head, tl.int64) * x[3]
    return corner + t * x[2] + c, (row + t < end) & (c < D)


@triton.jit
def load_gates(g, batch, row, head, end):
    """Gates [64] of one head; zeros from token ``end`` on. g is a tuple."""
    t = tl.arange(0, 64)
    corner = g[0] + tl.cast(batch, tl.int64) * g[1] + tl.cast(row, tl.int64) * g[2] + tl.cast(head, tl.int64) * g[3]
    return bounded(tl.load(corner + t * g[2], mask=row + t < end, other=0.0))


@triton.jit
def store_gates(g, value, batch, row, head, column, end):
    """[64] to a column of g, a tuple, up to token ``end``."""
    t = tl.arange(0, 64)
    corner = g[0] + tl.cast(batch, tl.int64) * g[1] + tl.cast(row, tl.int64) * g[2] + tl.cast(head, tl.int64) * g[3]
    tl.store(corner + t * g[2] + column, value, mask=row + t < end)


@triton.jit
def bounded(g):
    """Gates without -inf, which times zero would be NaN."""
    return tl.maximum(g, FLOOR).to(g.dtype)


@triton.jit
def sums_of_rows(matrix, x, total, TERMS: tl.constexpr):
    """total + matrix @ x, [64,BLOCK] in fp32; the matrix holds zeros and ones.

    What has 16 bits is an operand as it is; what is in fp32 is split into TERMS parts in bf16, 8 bits each.
    """
    if TERMS == 1:
        total = tl.dot(matrix.to(x.dtype), x, total, input_precision="ieee")
    else:
        for _ in tl.static_range(TERMS):
            part = x.to(tl.bfloat16)
            total = tl.dot(matrix.to(tl.bfloat16), part, total, input_precision="ieee")
            x -= part.to(tl.float32)
    return total


@triton.jit
def gate_sums(matrix, g, TERMS: tl.constexpr):
    """matrix @ g in bits: sums of gates that the matrix picks."""
    return sums_of_rows(matrix, g, tl.zeros(g.shape, tl.float32), TERMS) * LOG2E


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A computed tile as an operand of a product: in bf16 for PRECISION "bf16", else in fp32.

    For "tf32" it is rounded to what fp16 would keep: the hardware cuts operands off there, twice the error.
    """
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    elif PRECISION == "tf32":
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, summed in fp32; operands are tiles as loaded, or from ``operand``."""
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total, input_precision="ieee")
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total
