from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from hybridattn.evals.report.fronts import points
from hybridattn.evals.report.rows import exponent, problems, row_key, rows
from hybridattn.evals.report.store import read


def test_one_configuration_is_one_row(report: Path):
    attention, window, other = found = rows(read(report))
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
    assert first["median"] == pytest.approx(1.525e-3)  # of both rounds
    assert [(each["tokens"], each["batch"]) for each in window["decode"]] == [(1024, 1), (1024, 8), (4096, 1)]
    assert problems(found) == []


def test_a_model_on_another_device_is_another_row(report: Path, add: Callable[..., None]):
    add("attention", "model", {"parameters": 1}, threads=2)
    assert [row["config"]["threads"] for row in rows(read(report))].count(2) == 1
    assert len(rows(read(report))) == 4


def test_rows_of_one_name_are_told_apart(report: Path, add: Callable[..., None]):
    add("attention", "model", {"parameters": 1}, device="a GPU", dtype="bfloat16")
    add("window", "model", {"parameters": 1}, threads=2, train=None)
    found = rows(read(report))
    hashes = [row["config_sha256"][:8] for row in found if row["config"]["name"] == "window"]
    assert [row["label"] for row in found] == [
        "attention (a machine, float32)",
        f"window (1 threads, {hashes[0]})",
        "other",
        "attention (a GPU, bfloat16)",
        f"window (2 threads, {hashes[1]})",
    ]
    assert points(found)[0]["name"] == "attention (a machine, float32)"


def test_problems_are_listed(report: Path, add: Callable[..., None]):
    add("attention", "state", {"allocated": 9, "formula": 8}, tokens=256)
    add("window", "state", {"allocated": 5004, "formula": 5004}, tokens=16)  # exactly as many tokens as the window
    add("window", "state", {"allocated": 7, "formula": 7}, tokens=8)  # before the window is full
    assert problems(rows(read(report))) == [
        "attention: cache after 256 tokens: expected 8 bytes by its formula, got 9",
        "window: cache: expected a constant size, got 5000 and 5004 bytes",
    ]


def test_points_are_rows_that_have_everything(report: Path):
    attention, window = points(rows(read(report)))
    assert (attention["name"], window["name"]) == ("attention", "window")
    assert attention["pairs"] == window["pairs"] == 8  # 0.925 and 0.225 are farther apart than 0.475 and 0.125
    assert attention["state_bytes"] == 6400
    assert attention["state_tokens"] == 64
    assert attention["step"] == pytest.approx(1.525e-4)
    assert (attention["context"], attention["batch"]) == (1024, 8)
    assert attention["tokens_per_second"] == pytest.approx(8 / 1.525e-4)


def test_rows_without_recall_are_no_points(report: Path):
    assert points([row for row in rows(read(report)) if row["config"]["name"] == "other"]) == []


def test_times_are_medians_of_raw_samples(report: Path):
    """Medians and quartiles are those of the raw samples, regardless of the CPU probe."""
    stored = [each for each in read(report) if each["kind"] == "prefill" and each["config"]["name"] == "window"]
    samples = [x for each in stored if each["config"]["tokens"] == 2048 for x in each["figures"]["seconds"]]
    first, second, _ = rows(read(report))[1]["prefill"]
    assert second["median"] == median(samples)
    assert [second["lower_quartile"], second["upper_quartile"]] == pytest.approx(np.quantile(samples, [0.25, 0.75]))
    assert second["samples"] == len(samples) == 12
    assert first["rounds"] == {"of 0": pytest.approx(1.025e-4), "of 1": pytest.approx(2.05e-4)}


def test_rows_are_compared_within_rounds(report: Path, add: Callable[..., None]):
    """A machine that is slower in one round changes no ratio; a row that alone is slower there changes its ratio."""
    attention, window, other = rows(read(report))
    assert [each["speedup"] for each in attention["prefill"]] == [None] * 3
    for each, expected in zip(window["prefill"], (10, 20, 40), strict=True):
        assert each["speedup"] == {name: pytest.approx(expected) for name in ("median", "low", "high")}
    assert other["decode"][0]["speedup"]["median"] == pytest.approx(0.1)
    add("window", "prefill", {"seconds": [1.025e-3]}, tokens=1024, batch=1, round=1)
    first = rows(read(report))[1]["prefill"][0]["speedup"]
    assert first == {"median": pytest.approx(6), "low": pytest.approx(2), "high": pytest.approx(10)}
    add("window", "prefill", {"seconds": [1.0]}, tokens=7, batch=1, round=0)  # the baseline has no such length
    add("fast", "prefill", {"seconds": [1.0]}, tokens=1024, batch=1, round=0, threads=2)  # nor a row of two threads
    found = {row["label"]: row for row in rows(read(report))}
    assert found["window"]["prefill"][0]["speedup"] is None
    assert found["fast"]["prefill"][0]["speedup"] is None
    assert [found[name]["baseline"] for name in ("attention", "window", "fast")] == ["attention", "attention", None]


def test_times_of_two_runs_are_not_compared(report: Path, add: Callable[..., None]):
    """Rounds of two runs with equal numbers are not compared, since the machine's speed may differ."""
    for turn in range(2):
        alone = {"seconds": [1.0], "in_round": f"{turn} of another run"}
        add("window", "prefill", alone, tokens=1024, batch=1, round=turn)
    first, second, _ = rows(read(report))[1]["prefill"]
    assert (first["median"], first["speedup"]) == (1, None)
    assert second["speedup"] is not None


def test_the_baseline_is_the_one_that_was_asked_for_last(report: Path, add: Callable[..., None]):
    base = {"name": "window", "model": {"preset": "window"}, "train": {"steps": 100}, "device": "a machine"}
    key = row_key({**base, "dtype": "float32", "threads": 1})
    for turn in range(2):
        add("other", "decode", {"seconds": [1.0], "baseline": key}, tokens=1024, batch=1, graph=False, round=turn)
    other = rows(read(report))[2]
    assert other["baseline"] == "window"
    assert other["decode"][0]["speedup"]["median"] == pytest.approx((1.025e-5 + 2.05e-5) / 2)


def test_out_of_memory_in_one_round_leaves_the_others(report: Path, add: Callable[..., None]):
    for turn in range(2):
        figures = {"seconds": [1.0] * 10} if turn else {"reason": "out of memory"}
        add("window", "prefill", figures, tokens=8, batch=1, round=turn)
        add("window", "prefill", {"reason": "out of memory"}, tokens=9, batch=1, round=turn)
    row = next(row for row in rows(read(report)) if row["label"] == "window")
    assert row["prefill"][0]["samples"] == 10
    assert row["prefill"][1] == {"tokens": 9, "batch": 1, "graph": False, "reason": "out of memory"}


def test_runs_with_other_looks_are_not_pooled(report: Path, add: Callable[..., None]):
    figures = {"recall": {"8": 1.0, "32": 1.0}, "curve": [[50, 0.1], [100, 1.0]]}
    add("window", "recall", figures, seed=0, rate=0.01, looks=25)
    row = next(row for row in rows(read(report)) if row["label"] == "window")
    assert row["recall"]["8"] == {"median": 1.0, "low": 1.0, "high": 1.0, "seeds": 1}


def test_rows_without_a_number_of_pairs_in_common_are_no_points(report: Path, add: Callable[..., None]):
    add("other", "recall", {"recall": {"64": 0.5}, "curve": [[100, 0.5]]}, seed=0, rate=0.01)
    assert points(rows(read(report))) == []


def test_a_point_names_the_tokens_its_state_was_measured_after(report: Path, add: Callable[..., None]):
    add("attention", "state", {"reason": "out of memory"}, tokens=64)
    attention, _ = points(rows(read(report)))
    assert (attention["state_bytes"], attention["state_tokens"]) == (12800, 128)


def test_the_exponent_is_that_of_a_power_law():
    assert exponent([8, 16, 64], [3 * x**1.5 for x in (8, 16, 64)]) == pytest.approx(1.5)
    assert exponent([8, 8], [1, 2]) is None
