"""Device functions of the chunk kernels: bounds of a sequence, tiles of 64 tokens, sums of gates, matrix products.

B batch, T time, N sequences, D columns; a tile is [64 tokens, BLOCK columns]. A kernel takes a tensor [B,T,heads,D]
either as a TMA descriptor with blocks [1,64,1,BLOCK], or as a tuple (pointer, strides of batch, time and head). The
elements of its last dimension are contiguous.

The kernels sum gates by products with constant 0/1 matrices. These sums are exact in fp32 for any gates. Differences of
large running sums would lose the small gates that follow a large one.
"""

# pyright: reportGeneralTypeIssues=false
# pyright infers that jit functions never return.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-200.0)  # finite replacement for -inf: exp(FLOOR) is 0 in fp32; exact in 16 bits
COOL = tl.constexpr(-86.0)  # a channel whose gates sum to less than this in a chunk, in bits, is hot: see ``forward``


@triton.jit
def find_sequence(cu_seqlens, n, T, segments):
    """Return the batch row, first token, end (one past the last token) and first slot of sequence n.

    Slots number the chunks of all sequences. There are N * cdiv(T, 64) slots, or T // 64 + N for a packed row, where
    some stay unused. With ``segments`` > 1, n counts the segments of all sequences. Every sequence has ``segments`` of
    them, of whole chunks and of equal length except for the last ones.
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
    """Load the tile of x that starts at token ``row`` and column ``column``; zeros from token ``end`` and column D on.

    A descriptor is bounded by its tensor only, so with TMA ``end`` has to be T.
    """
    if TMA:
        tile = x.load([batch, head, row, column]).reshape(64, BLOCK)
    else:
        addresses, inside = _addresses(x, batch, row, head, column, end, D, BLOCK)
        tile = tl.load(addresses, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(x, value, batch, row, head, column, end, D, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Store a tile, cast to the tensor's dtype, at the address from which ``load_tile`` loads it."""
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
    """Load the gates [64] of one head; zeros from token ``end`` on. g is a tuple."""
    t = tl.arange(0, 64)
    corner = g[0] + tl.cast(batch, tl.int64) * g[1] + tl.cast(row, tl.int64) * g[2] + tl.cast(head, tl.int64) * g[3]
    return bounded(tl.load(corner + t * g[2], mask=row + t < end, other=0.0))


@triton.jit
def store_gates(g, value, batch, row, head, column, end):
    """Store ``value`` [64] to a column of g, a tuple, up to token ``end``."""
    t = tl.arange(0, 64)
    corner = g[0] + tl.cast(batch, tl.int64) * g[1] + tl.cast(row, tl.int64) * g[2] + tl.cast(head, tl.int64) * g[3]
    tl.store(corner + t * g[2] + column, value, mask=row + t < end)


@triton.jit
def bounded(g):
    """Replace gates of -inf by FLOOR: -inf times zero would be NaN."""
    return tl.maximum(g, FLOOR).to(g.dtype)


@triton.jit
def sums_of_rows(matrix, x, total, TERMS: tl.constexpr):
    """Compute total + matrix @ x, [64,BLOCK] in fp32; the matrix holds zeros and ones.

    x of 16 bits is an operand as it is (TERMS 1). x in fp32 is split into TERMS bf16 parts of 8 bits each.
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
    """Compute matrix @ g in bits (base 2): sums of the gates that the 0/1 matrix selects."""
    return sums_of_rows(matrix, g, tl.zeros(g.shape, tl.float32), TERMS) * LOG2E


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Cast a computed tile to an operand of a product: bf16 for PRECISION "bf16", else fp32.

    For "tf32" the tile is rounded to 10 bits of mantissa. The hardware would truncate, with twice the error.
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
    """Compute total + a @ b, summed in fp32; a and b are loaded tiles or results of ``operand``."""
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total, input_precision="ieee")
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total
