import time
from statistics import median

import pytest

from hybridattn.measure import timing


class Clock:
    """A clock that only `sleep` advances, so that the load of the machine has no effect."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_the_clock_is_a_real_one():
    assert 0.02 <= timing.timed(lambda: time.sleep(0.02)) < 10


def test_samples_are_single_calls_after_a_warm_up(clock: Clock):
    waits = iter([2.0, 2.0, *[0.25] * 100])
    assert timing.sample(lambda: clock.sleep(next(waits)), least=12, seconds=4.1) == [0.25] * 17


@pytest.mark.parametrize(("took", "calls"), [(0.625, 1), (0.5, 2)])
def test_a_long_call_is_not_warmed_up_twice(clock: Clock, took: float, calls: int):
    waits = iter([took] * calls + [0.125] * 2)
    assert timing.sample(lambda: clock.sleep(next(waits)), least=2, seconds=0.0625) == [0.125] * 2


def test_samples_are_taken_for_the_given_seconds(clock: Clock):
    assert len(timing.sample(lambda: clock.sleep(0.125), least=2, seconds=2)) == 16
    assert len(timing.sample(lambda: clock.sleep(0.125), least=20, seconds=2)) == 20
    assert len(timing.sample(lambda: clock.sleep(0.125), least=2, seconds=60, most=30)) == 30


def test_a_summary_of_samples():
    rounds = {"0": [3.0, 1.0, 2.0], "2": [10.0, 20.0]}
    found = timing.summary(rounds)
    assert found["median"] == median([3.0, 1.0, 2.0, 10.0, 20.0]) == 3
    assert (found["lower_quartile"], found["upper_quartile"], found["samples"]) == (2, 10, 5)
    assert found["rounds"] == {"0": 2, "2": 15}
    assert timing.summary({"0": [5.0]}) == {
        "median": 5,
        "lower_quartile": 5,
        "upper_quartile": 5,
        "samples": 1,
        "rounds": {"0": 5},
    }
