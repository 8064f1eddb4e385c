"""bf16 arithmetic in the interpreter inside ``exact_bf16`` equals PyTorch's."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hybridattn.workshop.interpreter_bf16 import narrow, widen


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a * b)
    tl.store(out + 2 * N + i, -a)
    tl.store(out + 3 * N + i, tl.where(a < b, a, b))
    tl.store(out + 4 * N + i, (a.to(tl.float32) * 3).to(tl.bfloat16))
    tl.store(out + 5 * N + i, a.to(tl.float16).to(tl.bfloat16))
    tl.store(out + 6 * N + i, tl.maximum(a, b))
    tl.store(out + 7 * N + i, tl.zeros([N], tl.bfloat16) + tl.sum(a, 0))
    tl.store(out + 8 * N + i, tl.zeros([N], tl.bfloat16) + tl.max(a, 0))
    tl.store(out + 9 * N + i, tl.cumsum(a, 0))


@triton.jit
def product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.trans(tl.load(y + at)), input_precision="ieee"))


def test_arithmetic_equals_that_of_torch():
    a, b = torch.randn(2, 32).bfloat16()
    out = torch.empty(10, 32, dtype=torch.bfloat16)
    arithmetic[(1,)](a, b, out, 32)
    wide = a.float()
    expected = [a + b, a * b, -a, torch.minimum(a, b), (wide * 3).bfloat16(), a, torch.maximum(a, b)]
    expected += [x.bfloat16().expand(32) for x in (wide.sum(), wide.max())]
    assert torch.equal(out[:9], torch.stack(expected))
    torch.testing.assert_close(out[9].float(), wide.cumsum(0), rtol=2**-8, atol=1e-6)


def test_product_sums_in_fp32():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    product[(1,)](a, b, out, 32)
    torch.testing.assert_close(out, a.float() @ b.float().T)


@pytest.mark.parametrize("scale", [1.0, 1e-39, 1e38])
def test_rounding_to_nearest_even(scale: float):
    x = torch.cat(
        (torch.randn(1000) * scale, torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]))
    )
    assert np.array_equal(narrow(x.numpy()), x.bfloat16().view(torch.uint16).numpy())
    assert torch.equal(torch.from_numpy(widen(narrow(x.numpy()))), x.bfloat16().float())
    assert np.isnan(widen(narrow(np.array([np.nan], dtype=np.float32))))
