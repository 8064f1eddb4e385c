"""The search of launch rows times correct candidates only, and restores the launch table."""

from pathlib import Path

import pytest

from hybridattn import cli
from hybridattn.kernels.runtime.architectures import SHARED_MEMORY
from hybridattn.workshop.tune import describe, forget, search, search_launches, searches
from hybridattn.workshop.workloads import WORKLOADS

TIMES = {(1, 4): 3.0, (2, 4): 1.0, (3, 4): 2.0}


def test_every_candidate_is_tried_and_the_row_restored():
    rows = {64: (1, 4), 128: (9, 9)}

    def error() -> float:
        if rows[64] == (4, 4):
            raise RuntimeError("out of shared memory")
        return float("nan") if rows[64] == (5, 4) else 1.0 if rows[64] == (3, 4) else 1e-3

    lines = list(search(rows, 64, [(n, 4) for n in range(1, 6)], error, lambda: TIMES[rows[64]]))
    assert [line["row"] for line in lines] == [(n, 4) for n in range(1, 6)]
    assert [line.get("seconds") for line in lines] == [3.0, 1.0, None, None, None]
    assert [line["shipped"] for line in lines] == [True, False, False, False, False]
    assert [line.get("reason") for line in lines[2:]] == [
        "error 1.0e+00",
        "RuntimeError: out of shared memory",
        "error nan",
    ]
    assert rows == {64: (1, 4), 128: (9, 9)}
    shown = describe("sweep", 64, lines).splitlines()
    assert shown[0] == "sweep 64: 2 of 5 rows run with correct results"
    assert [line.split()[0:2] for line in shown[1:]] == [["(2,", "4)"], ["(1,", "4)"]]
    assert shown[2].endswith("shipped")


def test_an_aborted_search_restores_the_row():
    rows = {64: (1, 4)}
    lines = search(rows, 64, [(2, 4)], lambda: 0.0, lambda: 1.0)
    next(lines)
    assert next(lines)["row"] == rows[64] == (2, 4)
    lines.close()
    assert rows == {64: (1, 4)}


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_candidates_have_the_form_of_the_rows(architecture: str):
    for kernel, found in searches(architecture).items():
        assert found.workload in WORKLOADS
        for dim, row in found.rows.items():
            assert {len(each) for each in found.candidates} == {len(row)}, kernel
            assert found.shape(dim).key_dim >= 16


def test_caches_of_launch_rows_are_cleared():
    from hybridattn.kernels.linear_attention.triton import op

    assert op._launch.cache_info().currsize >= 0
    forget()
    assert op._launch.cache_info().currsize == 0


def test_tuning_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="device: expected a GPU to tune on, got 'cpu'"):
        search_launches("cpu", [], [], 5, tmp_path / "tune.jsonl")
    with pytest.raises(SystemExit):
        cli.main(["kernels", "tune"])
    assert "expected a GPU" in capsys.readouterr().err
