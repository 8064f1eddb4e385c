from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from hybridattn.evals.report.compare import compare
from hybridattn.evals.report.compare import report as told
from hybridattn.evals.report.rows import rows
from hybridattn.evals.report.store import read


def test_a_report_has_not_changed_from_itself(report: Path):
    found = compare(rows(read(report)), rows(read(report)))
    assert found["changes"] == found["gone"] == found["come"] == []
    assert found["compared"] > 20


def test_another_speed_of_the_machine_shows_once(report: Path, add: Callable[..., None], tmp_path: Path):
    new = copytree(report, tmp_path / "new")
    for name, seconds in (("attention", 1e-3), ("window", 1e-4), ("other", 1e-2)):
        for turn in range(2):
            noise = 1 + 0.01 * turn if name == "attention" else 1.005
            slow = {"seconds": [5 * seconds * noise, 5.1 * seconds * noise]}
            add(name, "prefill", slow, out=new, tokens=1024, batch=1, round=turn)
    (change,) = compare(rows(read(report)), rows(read(new)))["changes"]
    assert change == ("attention", "prefill, 1024 tokens, batch 1, s", "0.00153", "0.00507", "3.33")


def test_figures_whose_ranges_do_not_overlap_are_listed(report: Path, add: Callable[..., None], tmp_path: Path):
    new = copytree(report, tmp_path / "new")
    for turn in range(2):
        drift = 1 + turn
        add("window", "prefill", {"seconds": [drift * 2.05e-4]}, out=new, tokens=1024, batch=1, round=turn)
        decode = {"seconds": [drift * (0.98 if turn else 1.05) * 1.025e-5]}
        add("window", "decode", decode, out=new, tokens=1024, batch=1, graph=False, round=turn)
    for seed in range(2):
        low = {"recall": {"8": 0.5, "32": 0.46}, "curve": [[100, 0.46]]}
        add("attention", "recall", low, out=new, seed=seed, rate=0.01)
    add("window", "state", {"allocated": 4000, "formula": 4000}, out=new, tokens=64)
    add("fresh", "model", {"parameters": 1}, out=new)
    for seed in range(2):
        shares = {"recall": {"8": 0.2, "16": 0.3, "32": 0.1}, "curve": [[100, 0.1]]}
        add("window", "recall", shares, out=new, seed=seed, rate=0.01)
    found = compare(rows(read(report)), rows(read(new)))
    assert [change[:2] for change in found["changes"]] == [
        ("attention", "recall, 8 pairs"),
        ("window", "prefill, 1024 tokens, batch 1, speed over attention"),
        ("window", "state after 64 tokens, bytes"),
    ]
    assert found["changes"][1][2:] == ("10.00", "5.00", "0.50")
    assert (found["gone"], found["come"]) == ([], ["fresh", "window: recall, 16 pairs"])
    text = told(report, new)
    assert "the ranges of 3 do not overlap" in text
    assert f"Only in {new}: fresh; window: recall, 16 pairs." in text


def test_two_rows_of_one_name_are_each_compared(report: Path, add: Callable[..., None], tmp_path: Path):
    add("attention", "model", {"parameters": 1}, device="a GPU")
    new = copytree(report, tmp_path / "new")
    add("attention", "state", {"allocated": 4000, "formula": 4000}, out=new, tokens=64)
    found = compare(rows(read(report)), rows(read(new)))
    assert [change[:2] for change in found["changes"]] == [("attention (a machine)", "state after 64 tokens, bytes")]


def test_only_comparable_figures_are_compared(report: Path, add: Callable[..., None], tmp_path: Path):
    """Ratios to different baselines, times without a baseline, and batches within other budgets are not compared."""
    new = copytree(report, tmp_path / "new")
    for turn in range(2):
        alone = {"seconds": [9.0], "in_round": f"{turn} of another run"}
        add("window", "prefill", alone, out=new, tokens=1024, batch=1, round=turn)
    add("window", "largest_batch", {"batch": 9, "tried": []}, out=new, tokens=1024, budget=70)
    found = compare(rows(read(report)), rows(read(new)))
    assert found["changes"] == []
    gone = ["largest batch after 1024 tokens in 7 bytes", "prefill, 1024 tokens, batch 1, speed over attention"]
    assert found["gone"] == [f"window: {name}" for name in sorted(gone, reverse=True)]
    assert found["come"] == ["window: largest batch after 1024 tokens in 70 bytes"]


def test_a_folder_without_measurements_is_named(report: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="report: expected a folder with"):
        told(report, tmp_path / "none")
