import pytest
import torch

from hybridattn.evals.throughput.calm import Probe


def test_a_disturbed_machine_shows(monkeypatch: pytest.MonkeyPatch):
    probe = Probe()
    times = iter([2.0, 1.0, 3.0, 1.0])
    probe.floor = 2.0
    monkeypatch.setattr(probe, "seconds", lambda: next(times))
    assert [probe.disturbance() for _ in range(4)] == [1, 1, 3, 1]


def test_the_floor_is_what_the_work_takes():
    with torch.inference_mode():
        probe = Probe()
        assert 0 < probe.floor <= min(probe.seconds() for _ in range(3)) * 1.5
        assert probe.disturbance() >= 1
