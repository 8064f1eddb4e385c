"""The contest: right results are timed, wrong ones are not, and it goes on where it was."""

import json
from pathlib import Path

import pytest
import torch

from hybridattn.workshop import contest
from hybridattn.workshop.contest import CPU_LENGTHS, WORKS, Shape, contestants, make_inputs, plan, wrong_by

CPU, SMALL = torch.device("cpu"), Shape(2, 600, 2, 8, 6)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    works = [("gated, per channel", SMALL), ("gated step", SMALL._replace(tokens=1)), ("softmax, causal", SMALL)]
    monkeypatch.setattr(contest, "plan", lambda device: works)
    most = {"copy_bytes_per_second": 1e10, "matmul_flop_per_second": 1e11}
    monkeypatch.setattr(contest, "ceilings", lambda *_: most)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_figures_and_where_they_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = contest.run("cpu", peers=True, samples=3, out=tmp_path / "kernels.jsonl")
    done = lines(out)
    assert [(line["work"], line["contestant"]) for line in done] == [
        ("gated, per channel", "hybridattn"),
        ("gated step", "hybridattn"),
        ("softmax, causal", "hybridattn"),
        ("softmax, causal", "SDPA flash"),
    ]
    first = done[0]
    seconds = first["forward_seconds"]
    assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
    assert first["forward_backward_seconds"]["median"] > seconds["median"]
    moved = 4 * 2 * 600 * 2 * (3 * 8 + 2 * 6)
    assert first["bytes_per_second"] == pytest.approx(moved / seconds["median"])
    assert first["share_of_copy"] == pytest.approx(first["bytes_per_second"] / 1e10)
    assert {"device", "versions", "commit", "config_sha256", "source_sha256", "date"} <= set(first)
    assert "softmax, causal" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [300, 700, 5000])
@pytest.mark.parametrize("window", [None, 512, 4096])
def test_useful_operations_of_a_window_are_those_of_the_keys_that_are_seen(window: int | None, tokens: int):
    name = f"softmax, window {window}" if window else "softmax, causal"
    seen = sum(min(i + 1, window or tokens) for i in range(tokens))
    counted = WORKS[name].flop(Shape(1, tokens, 1, 64, 64)) * tokens / (2 * 128)
    assert seen - 0.51 * (window or tokens) <= counted <= seen  # a key at the border counts as half of one


def test_what_is_done_is_not_measured_again(tmp_path: Path):
    out = contest.run("cpu", peers=False, samples=3, out=tmp_path / "kernels.jsonl")
    once = out.read_text()
    contest.run("cpu", peers=False, samples=3, out=out)
    assert out.read_text() == once
    contest.run("cpu", peers=True, samples=3, out=out)
    assert len(lines(out)) == len(once.splitlines()) + 1


class Clock:
    """A CUDA event of a GPU on which a call takes two milliseconds."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def elapsed_time(self, end: "Clock") -> float:
        return end.at - self.at


@pytest.mark.parametrize("is_captured", [True, False])
def test_short_kernels_are_timed_in_a_graph_where_they_can_be(is_captured: bool, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")

    def replays(fn, *, return_mode: str) -> list[float]:
        assert return_mode == "all"
        if not is_captured:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [0.004, 0.002, 0.003]

    def call() -> None:
        Clock.now += 2

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", replays)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = contest.seconds_of(call, torch.device("cuda"), 5, replay=True)
    assert (found["graph"], found["samples"]) == ((True, 3) if is_captured else (False, 5))
    assert found["median"] == pytest.approx(3e-6 if is_captured else 2e-3)
    single = contest.seconds_of(call, torch.device("cuda"), 5)
    assert (single["graph"], single["median"]) == (False, pytest.approx(2e-3))


def spoiled(change):
    def entries(work, device, peers):
        for name, call in contestants(work, device, peers):
            yield name, lambda *x, call=call: change(call(*x))

    return entries


def fails(o: torch.Tensor):
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda o: 1.001 * o, "against the reference, at most"), (lambda o: o * torch.nan, "error nan"), (fails, "image")],
)
def test_a_wrong_result_has_no_speed(change, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contest, "contestants", spoiled(change))
    done = lines(contest.run("cpu", peers=False, samples=3, out=tmp_path / "kernels.jsonl"))
    assert len(done) == 3
    assert all(reason in line["reason"] and "forward_seconds" not in line for line in done)


@pytest.mark.parametrize("work", WORKS)
def test_every_work_is_right(work: str):
    shape = SMALL._replace(tokens=1 if WORKS[work].step else 600)
    x = make_inputs(WORKS[work], shape, torch.float32, CPU)
    ((_, call),) = [*contestants(work, CPU, peers=False)]
    assert wrong_by(work, call, x) <= 1e-5


def test_a_wrong_gradient_is_seen():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()

        @staticmethod
        def backward(ctx, dq):
            return 1.01 * dq

    work = "softmax, causal"
    x = make_inputs(WORKS[work], SMALL, torch.float32, CPU)
    ((_, call),) = [*contestants(work, CPU, peers=False)]
    assert wrong_by(work, lambda q, k, v: call(Wrong.apply(q), k, v), x) > 5e-3


def test_the_plan_has_every_work_and_the_lengths_of_the_goals():
    linear, softmax, caches = {1024, 4096, 16384, 65536}, {1024, 4096, 16384, 32768}, {4096, 32768, 131072, 524288}
    for device, expected in ((CPU, [set(CPU_LENGTHS)] * 4), (torch.device("cuda"), [linear, softmax, {32768}, caches])):
        planned = list(plan(device))
        assert {name for name, _ in planned} == set(WORKS)
        assert len(set(planned)) == len(planned)
        for work, lengths in zip(
            ("gated, per channel", "softmax, full", "softmax, window 4096", "softmax, one token"), expected, strict=True
        ):
            assert {shape.tokens for name, shape in planned if name == work} == lengths


def test_bad_options():
    with pytest.raises(ValueError, match="expected samples >= 3, got samples=1"):
        contest.run("cpu", peers=False, samples=1)
