import math

import numpy as np
import pytest

from hybridattn.evals.speed.statistics import LEVEL, RESAMPLES, TOLERANCE, exponent, median, summary, undisturbed


def test_median_and_spread_are_of_all_samples():
    found = summary([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]])
    assert (found["median"], found["samples"]) == (6, 11)
    assert (found["p10"], found["p90"]) == (2, 10)
    assert 1 <= found["low"] < 6 < found["high"] <= 11


def test_the_median_of_one_round_is_the_usual_one():
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 49, 50, 127):
        samples = generator.lognormal(size=count)
        assert median([samples.tolist()]) == pytest.approx(np.median(samples))
        assert median([samples.tolist()] * 3) == pytest.approx(np.median(samples))


def test_rounds_count_alike_however_many_samples_they_have():
    assert median([[1.0] * 100, [2.0], [], [3.0] * 7]) == 2
    assert median([[1.0] * 100, [3.0]]) == 2
    found = summary([[1.0] * 100, [2.0], [], [3.0] * 7])
    assert (found["median"], found["low"], found["high"]) == (2, 1, 3)
    assert (found["p10"], found["p90"]) == (1, 3)


def test_nine_of_ten_samples_are_within_p90():
    assert summary([[0.001] * 18 + [0.1] * 2])["p90"] == 0.1
    assert summary([[0.001] * 19 + [0.1]])["p90"] == 0.001


def test_fewer_than_ten_samples_are_refused():
    with pytest.raises(ValueError, match="samples: expected at least 10, got 9"):
        summary([[1.0] * 5, [1.0] * 4])


def test_a_round_without_samples_is_no_round():
    rounds = [[1.0, 2.0, 3.0, 4.0, 5.0], [], [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]]
    assert summary(rounds) == summary([rounds[0], rounds[2]])
    by = np.random.default_rng(0).lognormal(0, 0.1, (3, 1 + RESAMPLES))
    assert summary(rounds, list(by)) == summary([rounds[0], rounds[2]], [by[0], by[2]])


def test_samples_are_multiplied_and_resampled_ones_by_what_their_run_would_have_found():
    rounds = [[1.0] * 6, [4.0] * 6]
    by = np.ones((2, 1 + RESAMPLES))
    by[1, 0] = 0.25  # as found, both rounds are alike
    found = summary(rounds, list(by))
    assert (found["p10"], found["median"], found["p90"]) == (1, 1, 1)
    assert (found["low"], found["high"]) == (1, 4)
    by[1, 1:] = 0.25
    assert summary(rounds, list(by)) == {**found, "high": 1.0}
    factors = np.random.default_rng(0).lognormal(0, 0.1, RESAMPLES)  # by as much in all rounds of a run
    by[:, 1:] *= factors
    found = summary(rounds, list(by))
    low, high = np.quantile(factors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))


def rounds_of(*probes: list[float]) -> list[tuple[list[float], list[float]]]:
    """Samples that are ten times the probe beside them."""
    return [([10 * x for x in each], each) for each in probes]


def test_undisturbed_samples_count():
    kept, tolerance = undisturbed(rounds_of([1.0, 1.05, 1.06], [1.3], [1.02] * 9), 1.0)
    assert kept == [[10, 10.5], [], [10.2] * 9]
    assert tolerance == TOLERANCE


def test_a_machine_that_was_disturbed_from_the_start_is_known_by_its_floor():
    kept, tolerance = undisturbed(rounds_of([1.6] * 10, [1.0] * 10), 1.0)
    assert (kept, tolerance) == ([[], [10] * 10], TOLERANCE)
    assert undisturbed(rounds_of([1.6] * 10), 1.6) == ([[16] * 10], TOLERANCE)


def test_where_they_are_too_few_the_least_disturbed_count():
    kept, tolerance = undisturbed(rounds_of([1.0] * 8 + [1.2, 1.4], [1.3, 1.5]), 1.0)
    assert kept == [[10] * 8 + [12], [13]]
    assert tolerance == 1.3


def test_they_come_from_half_of_the_rounds_at_least():
    """A single quiet round would tell nothing of how rounds differ."""
    kept, tolerance = undisturbed(rounds_of([1.0] * 20, [1.3, 1.1], [1.2, 1.4], [1.6]), 1.0)
    assert kept == [[10] * 20, [11], [], []]
    assert tolerance == 1.1


def test_the_interval_covers_the_median_of_99_of_100_runs():
    """Of one round of independent samples; the true median of this distribution is 1."""
    generator = np.random.default_rng(3)
    runs = [summary([generator.lognormal(0, 0.3, 25).tolist()]) for _ in range(200)]
    covered = sum(run["low"] <= 1 <= run["high"] for run in runs)
    assert covered >= 193
    wide = np.mean([math.log(run["high"] / run["low"]) for run in runs])
    normal = 2 * 2.576 * math.sqrt(math.pi / 2) * 0.3 / math.sqrt(25)  # of the median of many samples
    assert wide == pytest.approx(normal, rel=0.2)


def test_of_a_hundred_figures_that_did_not_change_the_intervals_of_two_runs_overlap():
    """At 95 % they would not in two of five such comparisons."""
    generator = np.random.default_rng(3)

    def run() -> dict[str, float]:
        return summary([(generator.lognormal(0, 0.03) * generator.lognormal(0, 0.03, 3)).tolist() for _ in range(40)])

    pairs = [(run(), run()) for _ in range(100)]
    assert all(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairs)


def test_from_ten_rounds_on_it_covers_the_median_of_a_machine_that_drifts():
    generator = np.random.default_rng(3)

    def run() -> dict[str, float]:
        return summary([(generator.lognormal(0, 0.05) * generator.lognormal(0, 0.05, 5)).tolist() for _ in range(10)])

    covered = sum(each["low"] <= 1 <= each["high"] for each in (run() for _ in range(100)))
    assert covered >= 95


def test_a_machine_that_drifts_between_rounds_has_a_wide_interval():
    generator = np.random.default_rng(3)
    steady = [generator.normal(1, 0.01, 40).tolist() for _ in range(5)]
    drifting = [[x * slow for x in each] for each, slow in zip(steady, (1, 1, 1.2, 1.1, 1.3), strict=True)]
    calm, wide = summary(steady), summary(drifting)
    assert calm["high"] - calm["low"] < 0.02
    assert wide["high"] - wide["low"] > 0.1


def test_the_exponent_is_that_of_a_power():
    sizes = [2048, 4096, 32768]
    assert exponent(sizes, [3e-9 * t**1.7 for t in sizes]) == pytest.approx(1.7)
    assert exponent([2048], [1.0]) is None
    assert exponent([2048, 2048], [1.0, 2.0]) is None
    assert math.isclose(exponent([1, 10], [5, 5]) or 0, 0, abs_tol=1e-12)
