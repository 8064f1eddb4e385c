from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hybridattn.evals.report import cells
from hybridattn.evals.report.rows import best_under, limits, points, problems, rows
from hybridattn.evals.speed import drift
from hybridattn.evals.speed.calm import READS
from hybridattn.evals.speed.drift import READ
from hybridattn.evals.speed.statistics import RESAMPLES, TOLERANCE, summary


def test_one_configuration_is_one_row(report: Path):
    attention, window, other = found = rows(cells.read(report))
    assert [row["config"]["name"] for row in found] == ["attention", "window", "other"]
    assert attention["recall"]["8"] == {"median": pytest.approx(0.925), "low": 0.9, "high": 0.95, "seeds": 2}
    assert attention["learnability"]["runs"] == 2
    assert len(attention["curves"]) == 2
    assert (other["recall"], other["learnability"], other["curves"]) == ({}, None, [])
    assert attention["state"] == {n: {"allocated": int(n) * 100, "formula": int(n) * 100} for n in ("64", "128")}
    assert attention["prefill_exponent"] == pytest.approx(2)
    assert window["prefill_exponent"] == pytest.approx(1)
    assert attention["decode_growth"] == pytest.approx(4)
    assert window["decode_growth"] == pytest.approx(1)
    (first, *_), samples = attention["prefill"], attention["prefill"][0]["samples"]
    assert (first["tokens"], first["batch"], samples, first["peak_bytes"]) == (1024, 1, 12, 10240)
    assert first["median"] == pytest.approx(1.025e-3)
    assert [(each["tokens"], each["batch"]) for each in window["decode"]] == [(1024, 1), (1024, 8), (4096, 1)]
    assert problems(found) == []


def test_a_model_on_another_device_is_another_row(report: Path, write_cell: Callable[..., None]):
    write_cell("attention", "model", {"parameters": 1}, threads=2)
    assert [row["config"]["threads"] for row in rows(cells.read(report))].count(2) == 1
    assert len(rows(cells.read(report))) == 4


def test_rows_of_one_name_are_told_apart(report: Path, write_cell: Callable[..., None]):
    write_cell("attention", "model", {"parameters": 1}, device="a GPU", dtype="bfloat16")
    write_cell("window", "model", {"parameters": 1}, threads=2, train=None)
    found = rows(cells.read(report))
    hashes = [row["config_sha256"][:8] for row in found if row["config"]["name"] == "window"]
    assert [row["label"] for row in found] == [
        "attention (a machine, float32)",
        f"window (1 threads, {hashes[0]})",
        "other",
        "attention (a GPU, bfloat16)",
        f"window (2 threads, {hashes[1]})",
    ]
    assert points(found)[0]["name"] == "attention (a machine, float32)"


def test_contradictions_are_told(report: Path, write_cell: Callable[..., None]):
    write_cell("attention", "state", {"allocated": 9, "formula": 8}, tokens=256)
    write_cell("window", "state", {"allocated": 5004, "formula": 5004}, tokens=16)  # just full
    write_cell("window", "state", {"allocated": 7, "formula": 7}, tokens=8)  # before the window is full
    assert problems(rows(cells.read(report))) == [
        "attention: the cache after 256 tokens has 9 bytes, by its formula 8",
        "window: the cache is declared constant and has 5000 and 5004 bytes",
    ]


def test_points_are_rows_that_have_everything(report: Path):
    attention, window = points(rows(cells.read(report)))
    assert (attention["name"], window["name"]) == ("attention", "window")
    assert attention["pairs"] == window["pairs"] == 8  # 0.925 and 0.225 are farther apart than 0.475 and 0.125
    assert attention["state_bytes"] == 6400
    assert attention["state_tokens"] == 64
    assert attention["step"] == pytest.approx(1.025e-4)
    assert (attention["context"], attention["batch"]) == (1024, 8)
    assert attention["tokens_per_second"] == pytest.approx(8 / 1.025e-4)


def test_nothing_recalled_is_no_point(report: Path):
    assert points([row for row in rows(cells.read(report)) if row["config"]["name"] == "other"]) == []


def test_disturbed_samples_do_not_count(report: Path, write_cell: Callable[..., None]):
    for turn in range(2):
        figures = {"seconds": [1.0] * 6 + [2.0] * 7, "probe": [1.0] * 6 + [1.3] * 7}
        write_cell("window", "prefill", figures, tokens=8, batch=1, round=turn)
    row = next(row for row in rows(cells.read(report)) if row["label"] == "window")
    first = row["prefill"][0]
    assert (first["tokens"], first["median"], first["samples"], first["set_aside"]) == (8, 1, 12, 14)
    assert first["tolerance"] == TOLERANCE


def test_times_are_corrected_for_slow_memory(report: Path, write_cell: Callable[..., None]):
    """Of rounds in which reads take twice as long and calls 1.41 times; what was measured is kept."""
    for turn in range(20):
        slow = 1 + turn % 2
        figures = {"seconds": [slow**0.5] * (1 + 2 * slow), "memory": [slow * READ * READS / 1.2] * 3}
        write_cell("window", "decode", figures, tokens=8, batch=1, graph=False, round=turn)
    row = next(row for row in rows(cells.read(report)) if row["label"] == "window")
    first = row["decode"][0]
    assert first["median"] == pytest.approx(1.2**0.5)
    assert first["high"] - first["low"] < 1e-6
    assert first["measured"] == pytest.approx((1 + 2**0.5) / 2)


def test_the_interval_knows_how_uncertain_the_correction_is(report: Path, write_cell: Callable[..., None]):
    """Rounds whose calls vary otherwise than by their reads, and are corrected to a level that is not theirs."""
    generator = np.random.default_rng(0)
    for turn in range(20):
        level = 1.5 + 0.3 * (turn % 3)
        figures = {"seconds": [level * np.exp(generator.normal(0, 0.1))] * 3, "memory": [level * READ * READS] * 3}
        write_cell("window", "decode", figures, tokens=8, batch=1, graph=False, round=turn)
    found = cells.read(report)
    first = next(row for row in rows(found) if row["label"] == "window")["decode"][0]
    ours = [each for each in found if each["kind"] == "decode" and each["config"].get("tokens") == 8]
    factors = [
        each[:1].repeat(1 + RESAMPLES) for each, cell in zip(drift.factors(found), found, strict=True) if cell in ours
    ]
    known = summary([cell["figures"]["seconds"] for cell in ours], factors)
    assert first["median"] == known["median"]
    assert first["high"] - first["low"] > 1.3 * (known["high"] - known["low"])


def test_out_of_memory_in_one_round_leaves_the_others(report: Path, write_cell: Callable[..., None]):
    for turn in range(2):
        figures = {"seconds": [1.0] * 10} if turn else {"reason": "out of memory"}
        write_cell("window", "prefill", figures, tokens=8, batch=1, round=turn)
        write_cell("window", "prefill", {"reason": "out of memory"}, tokens=9, batch=1, round=turn)
    row = next(row for row in rows(cells.read(report)) if row["label"] == "window")
    assert row["prefill"][0]["samples"] == 10
    assert row["prefill"][1] == {"tokens": 9, "batch": 1, "graph": False, "reason": "out of memory"}


def test_runs_that_were_looked_at_otherwise_are_not_pooled(report: Path, write_cell: Callable[..., None]):
    figures = {"recall": {"8": 1.0, "32": 1.0}, "curve": [[50, 0.1], [100, 1.0]]}
    write_cell("window", "recall", figures, seed=0, rate=0.01, looks=25)
    row = next(row for row in rows(cells.read(report)) if row["label"] == "window")
    assert row["recall"]["8"] == {"median": 1.0, "low": 1.0, "high": 1.0, "seeds": 1}


def test_rows_without_a_number_of_pairs_in_common_are_no_points(report: Path, write_cell: Callable[..., None]):
    write_cell("other", "recall", {"recall": {"64": 0.5}, "curve": [[100, 0.5]]}, seed=0, rate=0.01)
    assert points(rows(cells.read(report))) == []


def test_a_point_names_the_tokens_its_state_was_measured_after(report: Path, write_cell: Callable[..., None]):
    write_cell("attention", "state", {"reason": "out of memory"}, tokens=64)
    attention, _ = points(rows(cells.read(report)))
    assert (attention["state_bytes"], attention["state_tokens"]) == (12800, 128)


def test_the_best_within_a_budget():
    costs, gains = [10, 20, 40, 5], [0.5, 0.9, 0.90004, 0.4]
    assert best_under(costs, gains, [1, 5, 10, 30, 100]) == [None, 3, 0, 1, 1]


def test_budgets_are_round_and_cover_the_costs():
    assert limits([8704, 49672]) == [10e3, 20e3, 50e3]
    assert limits([0.0004, 0.0011]) == pytest.approx([0.0005, 0.001, 0.002])
    assert limits([3.0]) == [5]
    assert limits([5.0]) == [5]
