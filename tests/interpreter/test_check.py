"""The check of the Triton backend passes for the step, and reports faults inserted in it."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridattn.kernels.linear_attention.triton import decode
from hybridattn.workshop import check

pytestmark = pytest.mark.slow
NAME = "gated_linear_attention_step"
STEP = decode.step


def run(out: Path) -> bool:
    return check.check_operators("cpu", out, [NAME], ["triton"])


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch):
    """Check the step with per-channel gates, at key dims 11, 128 and 1024 only to be fast."""
    everything = check.cases
    monkeypatch.setattr(
        check,
        "cases",
        lambda *arguments: [
            case
            for case in everything(*arguments)
            if "per-channel" in case.operator and case.sizes.key_dim in (11, 128, 1024)
        ],
    )


def test_the_step_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path / "check.jsonl"), capsys.readouterr().out
    assert len((tmp_path / "check.jsonl").read_text().splitlines()) >= 15


def test_a_wrong_gate_is_reported(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    right = decode.step_constexprs
    monkeypatch.setattr(decode, "step_constexprs", lambda *x: {**right(*x), "GATE_PER_CHANNEL": False})
    assert not run(tmp_path / "check.jsonl")  # the first channel's gate for all of them
    assert "FAILED gated_linear_attention_step per-channel" in capsys.readouterr().out


@triton.jit
def racing_read(q, state, o, K, V: tl.constexpr, BLOCK: tl.constexpr):
    """Compute o += q S, each program for a part of the keys: the programs' order decides the order of the sum."""
    row, part = tl.program_id(0), tl.program_id(1)
    keys, columns = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 64)
    inside = (keys < K)[:, None] & (columns < V)[None, :]
    s = tl.load(state + (row * K + keys[:, None]) * V + columns[None, :], mask=inside, other=0.0)
    read = tl.sum(tl.load(q + row * K + keys, mask=keys < K, other=0.0)[:, None] * s, axis=0)
    tl.atomic_add(o + row * V + columns, read, mask=columns < V)


def racing_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor) -> Tensor:
    right = STEP(q, k, v, g, scale, state)
    if q.dtype != torch.float32 or q.shape[1] != 1 or q.shape[2] != state.shape[1]:
        return right
    o = torch.zeros_like(right)
    rows, key_dim = o.shape[0] * o.shape[2], q.shape[3]
    racing_read[(rows, triton.cdiv(key_dim, 16))](scale * q, state, o, key_dim, o.shape[3], 16)
    return o


def test_a_sum_in_the_order_of_the_programs_is_reported(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "step", racing_step)
    assert not run(tmp_path / "check.jsonl")
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failures
    assert all("the second run gave other bits" in line for line in failures)  # the error itself is within the limit
