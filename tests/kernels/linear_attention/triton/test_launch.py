"""The launch table of the steps, without a GPU and without Triton."""

import pytest

from hybridattn.kernels.linear_attention.triton import launch
from hybridattn.kernels.linear_attention.triton.launch import MOST_KEY_DIM, STEP, step_launch
from hybridattn.kernels.runtime.architectures import SHARED_MEMORY


@pytest.mark.parametrize("architecture", [*SHARED_MEMORY, "sm_89", "gfx950"])
def test_every_key_dim_has_a_row_that_holds_it(architecture: str):
    for key_dim in range(1, MOST_KEY_DIM + 1):
        row = step_launch(architecture, key_dim)
        assert row.block_k // 2 < key_dim <= row.block_k or row.block_k == 16
    assert set(STEP) == set(SHARED_MEMORY)


def test_a_row_is_verified_where_its_file_says_so(monkeypatch: pytest.MonkeyPatch):
    row = step_launch("sm_90", 100)
    assert row.name == "linear_attention_step K128 V32 warps4"
    for found, verified in (({}, False), ({"sm_90": {row.name: {}}}, True), ({"sm_80": {row.name: {}}}, False)):
        monkeypatch.setattr(launch, "read_verified", lambda folder, found=found: found)
        assert step_launch("sm_90", 100).verified is verified
