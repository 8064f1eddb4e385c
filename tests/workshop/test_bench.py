"""The benchmark times correct results only, compares times within a round, and continues an interrupted run."""

import json
from pathlib import Path

import pytest
import torch

from hybridattn import cli
from hybridattn.workshop import bench, gpu_timing
from hybridattn.workshop.bench import GOALS, Group, plan
from hybridattn.workshop.peers import peers
from hybridattn.workshop.workloads import WORKLOADS, Shape, error_of, make_inputs

CPU, SMALL = torch.device("cpu"), Shape(2, 600, 2, 8, 8)
GROUPS = [
    Group("gated, per channel", SMALL),
    Group("gated step", SMALL._replace(tokens=1)),
    Group("softmax, causal", SMALL, ("hybridattn", "SDPA flash")),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    def planned(device, lengths, with_peers):
        return [group if with_peers else group._replace(implementations=("hybridattn",)) for group in GROUPS]

    monkeypatch.setattr(bench, "plan", planned)
    most = {"copy_bytes_per_second": 1e10, "matmul_flop_per_second": 1e11}
    monkeypatch.setattr(bench, "ceilings", lambda *_: most)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_the_command_measures_prints_and_draws_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, plot = tmp_path / "new" / "bench.jsonl", tmp_path / "new" / "roofline.png"
    options = ["--device", "cpu", "--tokens", "64", "--samples", "3", "--peers", "--out", str(out), "--plot", str(plot)]
    with pytest.raises(SystemExit) as exit:
        cli.main(["kernels", "bench", *options])
    assert not exit.value.code
    done = {(line["workload"], line["implementation"]): line for line in lines(out)}
    assert {name for name, _ in done} == {*WORKLOADS, GOALS}
    assert not [line["reason"] for line in done.values() if "reason" in line]
    printed = capsys.readouterr().out
    assert all(name in printed for key in done for name in key)
    goals = done[GOALS, "hybridattn"]["ratios"]
    assert all(goal in printed and 0 < x["low"] <= x["median"] <= x["high"] for goal, x in goals.items())
    assert len(goals) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
def test_figures_and_provenance(tmp_path: Path):
    first, *_, ours, theirs = bench.run_benchmark("cpu", True, 3, out=tmp_path / "bench.jsonl")
    forward = first["forward"]
    assert 0 < forward["lower_quartile"] <= forward["median"] <= forward["upper_quartile"]
    assert forward["samples"] == len(forward["rounds"]) == 3
    assert first["forward_backward"]["median"] > forward["median"]
    moved, flop = 4 * 2 * 600 * 2 * 5 * 8, 2 * 600 * 2 * (4 * 8 * 8 + 64 * 16)
    assert first["bytes_per_second"] == pytest.approx(moved / forward["median"])
    assert first["share_of_copy"] == pytest.approx(first["bytes_per_second"] / 1e10)
    assert first["flop_per_second"] == pytest.approx(flop / forward["median"])
    assert {"device", "versions", "commit", "config_sha256", "source_sha256", "date", "threads"} <= set(first)
    ratios = [a / b for a, b in zip(*(x["forward"]["rounds"].values() for x in (theirs, ours)), strict=True)]
    assert theirs["forward"]["over_ours"] == pytest.approx(
        {"median": sorted(ratios)[1], "low": min(ratios), "high": max(ratios)}
    )


@pytest.mark.usefixtures("small")
def test_only_workloads_with_a_missing_implementation_are_measured_again(tmp_path: Path):
    out = tmp_path / "bench.jsonl"
    first = bench.run_benchmark("cpu", samples=3, out=out)
    assert bench.run_benchmark("cpu", samples=3, out=out) == json.loads(json.dumps(first))
    assert len(lines(out)) == 3
    bench.run_benchmark("cpu", True, 3, out=out)
    assert [(x["workload"], x["implementation"]) for x in lines(out)[3:]] == [
        ("softmax, causal", "hybridattn"),
        ("softmax, causal", "SDPA flash"),
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("failing", [2, 3])  # of the calls: compared, forward, with backward
def test_a_failure_does_not_affect_other_implementations(failing: int, monkeypatch: pytest.MonkeyPatch):
    calls = iter(range(1, 100))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled() == (failing == 2) and next(calls) >= failing - 1:
            raise RuntimeError("out of memory")
        return WORKLOADS["softmax, causal"].operator(q, k, v)

    monkeypatch.setattr(bench, "peers", lambda *_: {"SDPA flash": call})
    most = {"copy_bytes_per_second": 1e10, "matmul_flop_per_second": 1e11}
    ours, theirs = bench.measure(GROUPS[2], torch.float32, CPU, most, 3)
    assert "reason" not in ours
    assert {"forward", "forward_backward", "share_of_copy"} <= set(ours)
    assert theirs["reason"] == "RuntimeError: out of memory"
    assert ("forward" in theirs) == (failing == 3)


@pytest.mark.parametrize("tokens", [300, 700, 5000])
@pytest.mark.parametrize("window", [None, 512, 4096])
def test_flop_of_a_window_count_the_keys_in_it(window: int | None, tokens: int):
    name = f"softmax, window {window}" if window else "softmax, causal"
    seen = sum(min(i + 1, window or tokens) for i in range(tokens))
    counted = WORKLOADS[name].flop(Shape(1, tokens, 1, 64, 64)) * tokens / (2 * 128)
    assert seen - 0.51 * (window or tokens) <= counted <= seen  # a key at the border counts as half of one


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
def test_short_kernels_are_timed_in_a_graph_if_it_can_be_captured(is_captured: bool, monkeypatch: pytest.MonkeyPatch):
    class Graph:
        def __enter__(self):
            if not is_captured:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.start = Clock.now

        def __exit__(self, *_):
            self.took, Clock.now = Clock.now - self.start, self.start

        def replay(self):
            Clock.now += self.took / 4  # in a graph there is no time between kernels

    class Stream:
        __enter__ = __exit__ = lambda *_: None

    def call() -> None:
        Clock.now += 2

    for name, fake in (("Event", Clock), ("CUDAGraph", Graph), ("graph", lambda graph: graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    for name, fake in (("Stream", Stream), ("stream", lambda stream: stream), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, fake)
    gpu = torch.device("cuda")
    found = gpu_timing.interleaved({"call": call}, gpu, 5, replay=True)["call"]
    assert found == ([pytest.approx(5e-4 if is_captured else 2e-3)] * 5, is_captured)
    assert gpu_timing.interleaved({"call": call}, gpu, 5)["call"] == ([pytest.approx(2e-3)] * 5, False)


def fails(o: torch.Tensor):
    raise RuntimeError("no kernel image")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda o: 1.001 * o, "against the reference, limit"), (lambda o: o * torch.nan, "error nan"), (fails, "image")],
)
def test_a_wrong_result_is_not_timed(change, reason: str, tmp_path: Path, monkeypatch, capsys):
    for name in ("gated, per channel", "softmax, causal"):
        right = WORKLOADS[name].operator

        def wrong(*x, right=right, backend=None):
            o = right(*x, backend=backend)
            return o if backend == "reference" else change(o)

        monkeypatch.setitem(WORKLOADS, name, WORKLOADS[name]._replace(operator=wrong))
    gated, step, ours, theirs = bench.run_benchmark("cpu", True, 3, out=tmp_path / "bench.jsonl")
    assert all(reason in line["reason"] and "forward" not in line for line in (gated, ours))
    assert "over_ours" not in theirs["forward"]
    assert "forward" in step
    assert reason in capsys.readouterr().out
    if change is not fails:
        assert "against the reference" in bench.measure_goals(SMALL, 3)["reason"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_and_its_peers_are_right(name: str):
    workload = WORKLOADS[name]
    x = make_inputs(workload, SMALL._replace(tokens=1 if workload.kind == "step" else 600), torch.float32, CPU)
    for call in (workload.operator, *peers(name, CPU).values()):
        assert error_of(workload, call, x) <= 1e-5


def test_a_wrong_gradient_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()

        @staticmethod
        def backward(ctx, dq):
            return 1.01 * dq

    workload = WORKLOADS["softmax, causal"]
    x = make_inputs(workload, SMALL, torch.float32, CPU)
    assert error_of(workload, lambda q, k, v: workload.operator(Wrong.apply(q), k, v), x) > 5e-3


def test_the_plan_has_every_workload_and_the_lengths_of_the_goals():
    linear, softmax, caches = {1024, 4096, 16384, 65536}, {1024, 4096, 16384, 32768}, {4096, 32768, 131072, 524288}
    for device, lengths, expected in (
        (CPU, (), [{4096}, {1024}, {1024}, {1024}]),
        (torch.device("cuda"), (), [linear, softmax, {32768}, caches]),
        (torch.device("cuda"), (64, 256), [{64, 256}, {64, 256}, {256}, {64, 256}]),
    ):
        planned = list(plan(device, lengths))
        assert {group.workload for group in planned} - {GOALS} == set(WORKLOADS)
        assert len({key for group in planned for key in group.keys}) == len(planned)
        for name, tokens in zip(
            ("gated, per channel", "softmax, full", "softmax, window 4096", "softmax, one token"), expected, strict=True
        ):
            assert {group.shape.tokens for group in planned if group.workload == name} == tokens


def test_bad_options(monkeypatch: pytest.MonkeyPatch):
    for options in ({"samples": 1}, {"lengths": [4096, 10]}):
        with pytest.raises(ValueError, match="samples, tokens: expected samples >= 3 and tokens >= 64, got samples="):
            bench.run_benchmark("cpu", **options)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plot: expected matplotlib, .*; pip install hybridattn\[demo\]"):
        bench.run_benchmark("cpu", plot=Path("roofline.png"))
