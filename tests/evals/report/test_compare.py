from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from hybridattn.evals.report import cells
from hybridattn.evals.report.build import build
from hybridattn.evals.report.compare import compare
from hybridattn.evals.report.compare import report as told
from hybridattn.evals.report.rows import rows


def test_a_report_has_not_changed_from_itself(report: Path):
    found = compare(rows(cells.read(report)), rows(cells.read(report)))
    assert found["changes"] == found["gone"] == found["come"] == []
    assert found["compared"] > 20


def test_a_report_without_its_cells_is_compared(report: Path, tmp_path: Path):
    build(report, title="x")
    kept = tmp_path / "kept"
    kept.mkdir()
    (report / "results.json").rename(kept / "results.json")
    assert "0 of them changed" in told(report, kept)
    (kept / "results.json").unlink()
    with pytest.raises(ValueError, match="report: expected a folder with cells"):
        told(report, kept)


def test_only_what_is_beyond_noise_has_changed(report: Path, write_cell: Callable[..., None], tmp_path: Path):
    new = copytree(report, tmp_path / "new")
    for turn in range(2):
        slow, alike = ([seconds * (1 + 0.01 * i) for i in range(6)] for seconds in (2e-3, 1.004e-3))
        write_cell("attention", "prefill", {"seconds": slow}, out=new, tokens=1024, batch=1, round=turn)
        write_cell(
            "attention",
            "decode",
            {"seconds": [x / 10 for x in alike]},
            out=new,
            tokens=1024,
            batch=1,
            graph=False,
            round=turn,
        )
    for seed in range(2):
        low = {"recall": {"8": 0.5, "32": 0.46}, "curve": [[100, 0.46]]}
        write_cell("attention", "recall", low, out=new, seed=seed, rate=0.01)
    write_cell("window", "state", {"allocated": 4000, "formula": 4000}, out=new, tokens=64)
    write_cell("fresh", "model", {"parameters": 1}, out=new)
    for seed in range(2):
        shares = {"recall": {"8": 0.2, "16": 0.3, "32": 0.1}, "curve": [[100, 0.1]]}
        write_cell("window", "recall", shares, out=new, seed=seed, rate=0.01)
    found = compare(rows(cells.read(report)), rows(cells.read(new)))
    assert [change[:2] for change in found["changes"]] == [
        ("attention", "prefill, 1024 tokens, batch 1, s"),
        ("attention", "recall, 8 pairs"),
        ("window", "state after 64 tokens, bytes"),
    ]
    assert found["changes"][0][2:] == ("0.00103", "0.00205", "2.00")
    assert (found["gone"], found["come"]) == ([], ["fresh", "window: recall, 16 pairs"])
    text = told(report, new)
    assert "3 of them changed beyond noise" in text
    assert "fresh" in text


def test_two_rows_of_one_name_are_each_compared(report: Path, write_cell: Callable[..., None], tmp_path: Path):
    write_cell("attention", "model", {"parameters": 1}, device="a GPU")
    new = copytree(report, tmp_path / "new")
    write_cell("attention", "state", {"allocated": 4000, "formula": 4000}, out=new, tokens=64)
    assert rows(cells.read(report)) != rows(cells.read(new))
    found = compare(rows(cells.read(report)), rows(cells.read(new)))
    assert [change[:2] for change in found["changes"]] == [
        ("attention (a machine)", "state after 64 tokens, bytes"),
    ]
