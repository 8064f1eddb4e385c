"""Messages of the argument checks."""

from types import SimpleNamespace

import pytest
import torch

from hybridattn.kernels.runtime.backend import choose_backend, compute_dtype
from hybridattn.kernels.runtime.checks import check_shape
from hybridattn.kernels.runtime.sequences import sequence_ids, sequence_slices


def test_equal_letters_have_equal_sizes():
    sizes: dict[str, int] = {}
    check_shape(sizes, "q", torch.zeros(2, 3), "B T")
    assert sizes == {"B": 2, "T": 3}
    with pytest.raises(ValueError, match=r"k: expected shape \[B=2, T=3, H\], got \[2, 4, 1\]"):
        check_shape(sizes, "k", torch.zeros(2, 4, 1), "B T H")


def test_a_named_backend_runs_or_raises():
    assert choose_backend(None) == "torch"
    assert choose_backend("reference") == "reference"
    with pytest.raises(ValueError, match=r"backend: expected one of \['reference', 'torch', None\], got 'triton'"):
        choose_backend("triton")


def test_triton_is_chosen_for_cuda_tensors_that_its_kernels_support():
    q, cuda = torch.zeros(1), SimpleNamespace(is_cuda=True, dtype=torch.float64)
    lacks = "q: expected float32, got torch.float64"
    assert choose_backend(None, q) == "torch"
    assert choose_backend(None, cuda) == "triton"
    assert choose_backend(None, cuda, lacks) == "torch"
    assert choose_backend("triton", cuda) == "triton"
    with pytest.raises(ValueError, match=lacks + r" \(with backend='triton'\)"):
        choose_backend("triton", cuda, lacks)
    with pytest.raises(ValueError, match=r"q: expected a CUDA tensor with backend='triton' \(or TRITON_INTERPRET=1\)"):
        choose_backend("triton", q)
    with pytest.raises(ValueError, match=r"expected one of \['reference', 'torch', 'triton', None\], got 'cuda'"):
        choose_backend("cuda", q)


def test_sums_are_fp32_or_wider():
    half, double = torch.zeros(1).half(), torch.zeros(1).double()
    assert compute_dtype(half, None) == torch.float32
    assert compute_dtype(half, double) == torch.float64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequences_of_a_packed_row(dtype: torch.dtype):
    offsets = torch.tensor([0, 2, 2, 5], dtype=dtype)
    assert sequence_slices(offsets) == [slice(0, 2), slice(2, 2), slice(2, 5)]
    assert sequence_ids(offsets, 6).tolist() == [0, 0, 2, 2, 2, 3]
