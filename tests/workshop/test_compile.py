"""``hybridattn kernels compile``: shipped rows are within their ceilings, and exceeded ceilings are reported."""

import json
import re
from pathlib import Path

import pytest
import triton

from hybridattn.kernels.runtime.architectures import SHARED_MEMORY
from hybridattn.workshop import compile as gate
from hybridattn.workshop.compile import complaints, measure, read_ceilings, recorded, shipped_rows

ROWS = {(name, row.name): row for name, rows in shipped_rows().items() for row in rows}
FIRST = {next(key for key in ROWS if key[0] == name) for name in SHARED_MEMORY}
SIZE = re.compile(r" ([KVD]?\d+|\d+x\d+|(warps|stages)\d+)\b(?!-)")  # sizes in a row's name


def widest_of_each_variant() -> set[tuple[str, str]]:
    """Return, for sm_90, the row with the most registers of every kernel, dtype and variant, to be fast."""
    held = read_ceilings()["rows"]["sm_90"]
    names = sorted((name for key, name in ROWS if key == "sm_90"), key=lambda n: held.get(n, {}).get("registers", 0))
    return {("sm_90", name) for name in {SIZE.sub("", name): name for name in names}.values()}


HERE = sorted(FIRST | widest_of_each_variant())
SPILLS = {"flash_attention_key_gradients D128 V128 64x128 warps8 stages3 blocks"}  # its ceiling allows two spills
FIGURES = {"registers": 72, "spill_instructions": 0, "spilled_bytes": 0, "shared_memory": 512, "matrix": 8, "tma": 0}


def test_every_row_has_a_ceiling_and_every_ceiling_a_row():
    ceilings = read_ceilings()["rows"]
    assert {(name, row) for name, rows in ceilings.items() for row in rows} == set(ROWS)
    assert sum(len(rows) for rows in shipped_rows().values()) == len(ROWS)  # no two rows share a name


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ != read_ceilings()["triton"], reason="ceilings are of another compiler")
@pytest.mark.parametrize("key", HERE, ids="-".join)
def test_shipped_rows_are_under_their_ceilings(key: tuple[str, str]):
    architecture, name = key
    figures, ceiling = measure(ROWS[key], architecture), read_ceilings()["rows"][architecture][name]
    assert complaints(architecture, figures, ceiling) == []
    assert all((figures[each] > 0) == (ceiling[each] > 0) for each in gate.PRESENT)  # the step has none
    if name.startswith("flash") and name not in SPILLS and not name.endswith(" fp32"):
        assert figures["spill_instructions"] == figures["spilled_bytes"] == 0
    assert figures["seconds"] > 0


@pytest.mark.parametrize(("architecture", "warps"), [("sm_90", 1), ("gfx942", 1)])
def test_a_spill_is_reported(architecture: str, warps: int):
    """A single warp cannot hold the tile of this step in its registers."""
    (row,) = (row for key, row in ROWS.items() if key[0] == architecture and " K1024 " in key[1])
    figures = measure(row._replace(num_warps=warps), architecture)
    messages = complaints(architecture, figures, read_ceilings()["rows"][architecture][row.name])
    assert figures["spill_instructions"] > 0
    assert figures["spilled_bytes"] > 0
    assert any(line.startswith("spill_instructions") for line in messages)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({}, []),
        ({"registers": 71}, []),
        ({"tensor_memory": 640}, ["tensor memory 640 is over the architecture's 512"]),
        ({"registers": 73}, ["registers 73 is over 72"]),
        ({"matrix": 4}, []),
        ({"matrix": 0}, ["no matrix instructions, the ceiling has 8"]),
        (
            {"shared_memory": 1 << 20},
            ["shared memory 1048576 is over the architecture's 232448", "shared_memory 1048576 is over 512"],
        ),
    ],
)
def test_messages_about_exceeded_ceilings(change: dict[str, int], messages: list[str]):
    assert complaints("sm_90", FIGURES | {"tensor_memory": 0} | change, FIGURES) == messages


def test_a_row_without_a_ceiling_is_reported():
    assert complaints("sm_90", FIGURES | {"tensor_memory": 0}, None) == ["no ceiling recorded; --record adds it"]


def test_ceilings_go_down_only_unless_they_may_rise():
    worse, better = FIGURES | {"registers": 80}, FIGURES | {"registers": 60}
    assert recorded(None, worse, False) == worse
    assert recorded(FIGURES, worse, False) == FIGURES
    assert recorded(FIGURES, better, False) == better
    assert recorded(FIGURES, worse, True) == worse


def test_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(
        gate,
        "measure",
        lambda row, architecture: FIGURES | {"tensor_memory": 0, "seconds": 0.1, "registers": registers},
    )
    file, registers = tmp_path / "ceilings.json", 72
    assert not gate.check_compilation(["sm_90"], file=file)
    assert "no ceiling recorded" in capsys.readouterr().out
    assert gate.check_compilation(["sm_90"], record=True, file=file)
    registers = 80
    assert not gate.check_compilation(["sm_90"], record=True, file=file)
    assert "registers 80 is over 72" in capsys.readouterr().out
    kept = json.loads(file.read_text())["rows"]
    assert list(kept) == ["sm_90"]
    assert {figures["registers"] for figures in kept["sm_90"].values()} == {72}
    assert gate.check_compilation(["sm_90"], record=True, may_rise=True, file=file)
    file.write_text(file.read_text().replace('"triton": "', '"triton": "0.'))
    with pytest.raises(ValueError, match="record all rows anew with --may-rise"):
        gate.check_compilation(["sm_90"], record=True, file=file)


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"arch: expected one of \['sm_80', 'sm_90', 'sm_100', 'gfx942'\], got 'sm_70'"
    ):
        shipped_rows(["sm_70"])
    with pytest.raises(ValueError, match=r"kernel: expected one of \[.*'linear_attention_step'.*\], got 'dance'"):
        shipped_rows(kernels=["dance"])
