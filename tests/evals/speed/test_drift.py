import math

import numpy as np
import pytest

from hybridattn.evals.speed import drift
from hybridattn.evals.speed.calm import READS
from hybridattn.evals.speed.drift import FEWEST, READ, SHARE, slopes
from hybridattn.evals.speed.statistics import RESAMPLES

REFERENCE = 1.2  # the level that times are brought to, in units of the fastest reads here
FASTEST = READS * READ / REFERENCE


def cell(turn: int, seconds: list[float], memory: list[float], **settings) -> dict:
    """One that was timed undisturbed."""
    config = {"name": "a", "model": {}, "device": "cpu", "dtype": "float32", "threads": 1, "round": turn, "tokens": 8}
    kind = settings.pop("kind", "decode")
    figures = {"seconds": seconds, "probe": [1.0] * len(seconds), "memory": memory}
    return {"kind": kind, "config": {**config, **settings}, "figures": figures}


def drifting(exponents: dict[str, float], levels: list[float], noise: float = 0.0, names: str = "ab") -> list[dict]:
    """Cells of models whose times are 1, 2, .. ms at the fastest memory, and longer as it is slower."""
    generator = np.random.default_rng(0)
    cells = []
    for turn, level in enumerate(levels):
        for number, name in enumerate(names, 1):
            for kind, exponent in exponents.items():
                seconds = number * 1e-3 * level**exponent * generator.lognormal(0, noise, 9)
                memory = FASTEST * level * np.array([1, 1.3, 1.2, 1, 5, 1, 1, 1, 1])
                cells.append(cell(turn, seconds.tolist(), memory.tolist(), kind=kind, name=name))
    return cells


def factors(cells: list[dict]) -> list[float]:
    """Those that were found."""
    return drift.factors(cells)[:, 0].tolist()


LEVELS = [1.0, 1.1, 1.3, 2.0, 1.2, 1.7, 2.4, 1.5, 1.4, 1.1, 1.9, 1.0]


def test_what_slow_memory_explains_is_taken_out():
    cells = drifting({"decode": 0.6, "prefill": 0.2}, LEVELS)
    exponents = {"decode": 0.6, "prefill": 0.2}
    for each, factor in zip(cells, factors(cells), strict=True):
        at_reference = (1 if each["config"]["name"] == "a" else 2) * 1e-3 * REFERENCE ** exponents[each["kind"]]
        assert factor * np.median(each["figures"]["seconds"]) == pytest.approx(at_reference)


def test_two_runs_agree_though_memory_was_slower_in_one():
    medians = []
    for levels in (LEVELS, [1.0, *(1.2 * level for level in LEVELS)]):
        cells = drifting({"decode": 0.6}, levels, noise=0.05)
        pooled = [x * by for each, by in zip(cells, factors(cells), strict=True) for x in each["figures"]["seconds"]]
        raw = [x for each in cells for x in each["figures"]["seconds"]]
        medians.append((np.median(pooled), np.median(raw)))
    (left, left_raw), (right, right_raw) = medians
    assert right == pytest.approx(left, rel=0.02)
    assert right_raw > 1.05 * left_raw


def test_times_are_not_brought_to_a_level_that_is_far_from_all_of_the_run():
    """From 1.5 to 2 as far as 1.125, a factor of 4 / 3 less; a single round is no range."""
    for levels, near in (([1.5, 2.0] * 10, 1.5**2 / 2), ([2.0, 2.4] * 10, 2.0**2 / 2.4), ([2.0] * 20 + [1.0], 2.0)):
        cells = drifting({"decode": 0.6}, levels)
        reached = max(near, REFERENCE)
        assert factors(cells)[0] == pytest.approx((reached / levels[0]) ** 0.6)


def test_runs_whose_fastest_reads_differ_are_brought_to_the_same_level():
    quick, slow = (factors(drifting({"decode": 0.6}, levels)) for levels in (LEVELS, LEVELS[1:9] + LEVELS[1:9]))
    assert quick[1 * 2] == pytest.approx(slow[0])


def test_a_machine_that_does_not_drift_is_left_alone():
    cells = drifting({"decode": 0.0}, [1.0, *[1.02, 1.04] * 8], noise=0.01)
    assert factors(cells) == pytest.approx([1.0] * len(cells), abs=0.01)


def test_times_that_fall_as_memory_slows_are_chance():
    assert factors(drifting({"decode": -0.3}, LEVELS)) == [1.0] * 2 * len(LEVELS)


def test_few_rounds_tell_no_drift():
    assert set(factors(drifting({"decode": 0.6}, LEVELS[: FEWEST - 1]))) == {1.0}


def disturb(cell: dict, share: float) -> None:
    """Add disturbed calls, which took long, to undisturbed ones."""
    more = round(len(cell["figures"]["seconds"]) * share / (1 - share))
    cell["figures"]["seconds"] = [*cell["figures"]["seconds"], *[9.0] * more]
    cell["figures"]["probe"] = [*cell["figures"]["probe"], *[1.5] * more]


def test_the_times_of_disturbed_samples_tell_nothing():
    cells = drifting({"decode": 0.6}, LEVELS)
    expected = factors(cells)
    for each in cells:
        disturb(each, 0.5)
    assert factors(cells) == pytest.approx(expected)


def test_what_a_neighbour_on_the_core_explains_is_taken_out(monkeypatch: pytest.MonkeyPatch):
    """Samples that seem undisturbed are slow as well where many are not."""
    monkeypatch.setattr(drift, "CALLS", 0)
    cells = drifting({"decode": 0.6, "prefill": 0.2}, LEVELS)
    shares = [0.1, 0.25, 0.5, 0.0, 0.75, 0.1, 0.0, 0.5, 0.1, 0.5, 0.25, 0.25]  # of the rounds
    slowed = {"decode": 0.8, "prefill": 0.1}
    for each in cells:
        share = shares[each["config"]["round"]]
        each["figures"]["seconds"] = [x * math.exp(slowed[each["kind"]] * share) for x in each["figures"]["seconds"]]
        disturb(each, share)
    for each, factor in zip(cells, factors(cells), strict=True):
        model = 1e-3 * (1 if each["config"]["name"] == "a" else 2)
        at = model * REFERENCE ** {"decode": 0.6, "prefill": 0.2}[each["kind"]] * math.exp(slowed[each["kind"]] * SHARE)
        assert factor * np.median(each["figures"]["seconds"][:9]) == pytest.approx(at)


def test_figures_whose_calls_are_longer_are_not_corrected_by_more():
    """More of their calls are disturbed, which says nothing of their times: a round has one share."""
    cells = drifting({"decode": 0.0}, [1.2] * 12, names="ab")
    for each in cells:
        busy = each["config"]["round"] % 2 == 0
        each["figures"]["seconds"] = [x * (1.3 if busy else 1) for x in each["figures"]["seconds"]]
        disturb(each, (0.75 if each["config"]["name"] == "b" else 0.25) if busy else 0.0)
    found = factors(cells)
    assert found[0] == pytest.approx(found[1])
    assert found[0] * 1.3 == pytest.approx(found[2])


def test_times_are_not_brought_to_a_calm_that_the_run_never_came_near(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drift, "CALLS", 0)
    shares = [0.5, 0.6] * 10
    cells = drifting({"decode": 0.6}, [1.2] * len(shares), names="a")
    for each, share in zip(cells, shares, strict=True):
        each["figures"] = {name: values * 10 for name, values in each["figures"].items()}
        each["figures"]["seconds"] = [x * math.exp(0.8 * share) for x in each["figures"]["seconds"]]
        disturb(each, share)
    assert factors(cells)[:2] == pytest.approx([math.exp(0.8 * -0.1), math.exp(0.8 * -0.2)])


def test_one_disturbed_round_of_a_quiet_machine_changes_little():
    cells = drifting({"decode": 0.0}, [1.2] * 40, noise=0.02, names="abcd")
    for each in cells[-4:]:
        disturb(each, 0.5)
    assert factors(cells)[:-4] == pytest.approx([1] * 156, abs=0.005)


def test_the_share_of_a_round_does_not_depend_on_which_figures_it_has(monkeypatch: pytest.MonkeyPatch):
    """As rounds that are added have only some, and those that are disturbed more often, say."""
    cells = drifting({"decode": 0.0}, [1.2] * 24, names="ab")
    for each in cells:
        busy = each["config"]["round"] % 2
        disturb(each, (0.4 if each["config"]["name"] == "b" else 0.1) + 0.1 * busy)
    only_b = [each for each in cells if each["config"]["round"] < 12 or each["config"]["name"] == "b"]
    monkeypatch.setattr(drift, "CALLS", 0)
    found = drift._shares(only_b, 1.0)
    assert found[13] - found[12] == pytest.approx(found[1] - found[0], abs=0.03)
    assert found[12] == pytest.approx(found[0], abs=0.03)
    assert found[1] - found[0] == pytest.approx(0.1, abs=0.03)
    plain = {
        turn: np.mean([x > 1 for each in only_b if each["config"]["round"] == turn for x in each["figures"]["probe"]])
        for turn in found
    }
    assert plain[12] - plain[0] > 0.1


def test_few_calls_tell_little_of_a_round():
    cells = drifting({"decode": 0.0}, [1.2] * 20, names="a")
    for each in cells[:10]:
        each["figures"]["probe"] = [1.0] * 900
    cells[0]["figures"]["probe"] = [1.0, *[1.5] * 899]
    cells[10]["figures"]["probe"] = [1.5]
    found = drift._shares(cells, 1.0)
    everywhere = 900 / (9000 + 1 + 81)
    assert found[0] == pytest.approx(0.95, abs=0.02)
    assert everywhere < found[10] < 0.13


def test_a_kind_with_undisturbed_samples_in_few_rounds_is_left_as_it_is():
    cells = drifting({"decode": 0.6, "training": 0.6}, LEVELS)
    for each in cells:
        if each["kind"] == "training" and each["config"]["round"] >= FEWEST - 1:
            each["figures"]["probe"] = [1.5] * 9
    found = factors(cells)
    assert {factor for each, factor in zip(cells, found, strict=True) if each["kind"] == "training"} == {1.0}
    assert found[0] != 1


def test_reads_of_a_row_count_for_all_its_figures_of_a_round():
    cells = drifting({"decode": 0.6, "prefill": 0.2}, LEVELS, names="a")
    expected = factors(cells)
    for each in cells[::2]:
        each["figures"]["memory"] = []
    assert factors(cells) == pytest.approx(expected)


def test_a_row_without_reads_has_the_level_of_its_round_and_that_the_usual_one():
    cells = drifting({"decode": 0.6}, [*LEVELS, 1.3])  # the usual level
    expected = factors(cells)
    cells[6]["figures"]["memory"] = []  # of one of two rows
    assert factors(cells)[6] == pytest.approx(expected[6])
    cells[-1]["figures"]["memory"] = cells[-2]["figures"]["memory"] = []
    assert factors(cells)[-2:] == pytest.approx(expected[-2:], rel=0.02)


def test_a_round_without_undisturbed_samples_does_not_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drift, "CALLS", math.inf)  # nor does its share
    cells = drifting({"decode": 0.6}, LEVELS, names="a")
    cells[4]["figures"]["probe"] = [1.5] * 9
    for turn in (4, 6):
        assert factors(cells)[turn] == pytest.approx((REFERENCE / LEVELS[turn]) ** 0.6)


def test_machines_are_apart():
    slow = drifting({"decode": 0.6}, LEVELS)
    quick = [{**each, "config": {**each["config"], "device": "another"}} for each in drifting({"decode": 0.1}, LEVELS)]
    assert factors([*slow, *quick]) == pytest.approx([*factors(slow), *factors(quick)])


def test_cells_without_times_or_reads_have_none_to_correct():
    others = [{"kind": "model", "config": {}, "figures": {"parameters": 3}}]
    old = [{**each, "figures": {"seconds": [1.0], "probe": [1.0]}} for each in drifting({"decode": 0.6}, LEVELS)]
    gpu = [cell(turn, [1.0 + turn], []) for turn in range(20)]
    assert factors([*others, *old, *gpu]) == [1.0] * (len(others) + len(old) + len(gpu))


def test_factors_of_resampled_runs_vary_as_those_of_runs_do():
    """Where noise is common to all models, as a machine's is, many cells know little more than one."""
    first, spread = [], []
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0, 0.1, len(LEVELS))
        cells = drifting({"decode": 0.6}, LEVELS, names="abcd")
        for each in cells:
            each["figures"]["seconds"] = [
                x * math.exp(noise[each["config"]["round"]]) for x in each["figures"]["seconds"]
            ]
        found = drift.factors(cells)
        assert found.shape == (len(cells), 1 + RESAMPLES)
        first.append(np.log(found[0, 0]))
        spread.append(np.log(found[0, 1:]).std())
    assert np.median(spread) == pytest.approx(np.std(first), rel=0.25)


def group(*points: tuple[float, ...]) -> np.ndarray:
    """One of the rounds 0, 1, ..."""
    return np.column_stack([np.arange(len(points)), np.array(points)])


def test_slopes_are_shared_and_each_group_has_its_own_means():
    three = group((0.0, 0.0, 5.0), (1.0, 0.0, 5.5), (1.0, 1.0, 7.5))
    groups, once = [three, group((10.0, 3.0, -3.0), (11.0, 4.0, -0.5))], np.ones((1, 3))
    assert slopes(groups, once)[0] == pytest.approx([0.5, 2.0])
    assert slopes([group((0.0, 5.0), (1.0, 5.5)), group((10.0, -3.0), (12.0, -2.0))], once)[0] == pytest.approx([0.5])
    assert slopes([group((1.0, 2.0))], once) == slopes([group((0.0, 1.0), (1.0, 0.0))], once) == [[0]]


def test_a_slope_below_0_is_0_and_the_others_are_fitted_without_it():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]])
    y = x @ [0.7, -0.4, 0.2]
    expected = np.linalg.lstsq(x[:, [0, 2]] - x[:, [0, 2]].mean(0), y - y.mean())[0]
    assert slopes([group(*np.column_stack([x, y]))], np.ones((1, 40)))[0] == pytest.approx(
        [expected[0], 0, expected[1]]
    )
    assert min(expected) > 0


def test_a_round_counts_by_its_weight():
    """Once for each time that it was drawn, in all groups that have it."""
    generator = np.random.default_rng(0)
    groups = [group(*(generator.normal(size=(count, 3)) + np.array([1, 1, 0]))) for count in (12, 9)]
    weights = generator.integers(4, size=(5, 12))
    for run, found in zip(weights, slopes(groups, weights), strict=True):
        repeated = [np.repeat(each, run[: len(each)], axis=0) for each in groups]
        assert found == pytest.approx(slopes(repeated, np.ones((1, 12)))[0])
    nothing = np.array([[0] * 9 + [1, 2, 3]])
    assert slopes(groups, nothing) == pytest.approx(slopes(groups[:1], nothing))
    for times in (1, 3):  # the rounding of products is no slope
        assert slopes(groups, times * np.eye(12)) == pytest.approx(np.zeros((12, 2)))
