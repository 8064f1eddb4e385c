import sys
from collections.abc import Callable

import pytest
import torch

from hybridattn.evals.speed.calm import READS, SETS, Probe


def test_a_disturbed_machine_shows(monkeypatch: pytest.MonkeyPatch):
    probe = Probe()
    probe.floor = 2.0
    assert [probe.is_calm(seconds) for seconds in (2.2, 2.1, 1.0, 2.0, 1.05)] == [False, True, True, False, True]
    assert probe.floor == 1


def test_it_waits_until_the_machine_is_undisturbed_but_not_forever(monkeypatch: pytest.MonkeyPatch):
    probe = Probe()
    times = iter([3.0, 2.2, 2.05, 1.9])
    probe.floor = 2.0
    monkeypatch.setattr(probe, "seconds", lambda: next(times))
    assert probe.wait(60) == 2.05
    monkeypatch.setattr(probe, "seconds", lambda: 3.0)
    assert probe.wait(0.01) == 3.0


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_memory_is_kept(run_python: Callable[..., str]):
    """In a process of its own: how memory is allocated is not undone."""
    code = """
import resource, torch
from hybridattn.evals.speed.calm import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        x = torch.ones(3_000_000)
        for _ in range(4):
            x = torch.cat([x[:1_500_000], (x[1_500_000:] + 1).exp()])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = max(faults() for _ in range(3))
keep_freed_memory()
faults()
print(fresh, faults())
"""
    fresh, kept = map(int, run_python(code).split())
    assert fresh > 20 * kept


def test_the_floor_is_what_the_work_takes():
    with torch.inference_mode():
        probe = Probe()
        assert 0 < probe.floor <= min(probe.seconds() for _ in range(3)) * 1.5
        assert probe.is_calm(probe.floor)


def test_reads_are_of_memory_and_not_of_a_cache(monkeypatch: pytest.MonkeyPatch):
    """The sets of places take turns, since those that were just read are in the core's own cache."""
    probe, read = Probe(), []
    monkeypatch.setattr(probe, "is_calm", lambda seconds: True)
    select = torch.index_select

    def spy(values: torch.Tensor, dim: int, places: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        read.append((places.data_ptr(), values[places].numel()))
        return select(values, dim, places, out=out)

    monkeypatch.setattr(torch, "index_select", spy)
    assert [len(probe.reads()) for _ in range(10)] == [SETS] * 10
    seen = [each for each, _ in read]
    assert len(set(seen)) == 5 * SETS, "a set was read again before its turn"
    assert seen[5 * SETS :] == seen[: 5 * SETS]
    cache_line, own_cache = 64, 2 << 20
    assert sum(count for _, count in read[: 5 * SETS]) * cache_line > 4 * own_cache, "all sets fit into a core's cache"
    assert probe._values.nbytes > 4 * 5 * SETS * READS * cache_line, "places would share cache lines"


def test_reads_while_somebody_else_used_the_core_are_left_out(monkeypatch: pytest.MonkeyPatch):
    probe = Probe()
    probe.floor = 1.0
    times = iter([1.0, 1.0, 1.0, 1.3, 1.2, 1.0, 1.01, 1.02] + [2.0] * 2 * SETS)
    monkeypatch.setattr(probe, "seconds", lambda: next(times))
    found = probe.reads()
    assert len(found) == 2
    assert all(0 < each < 1 for each in found)
