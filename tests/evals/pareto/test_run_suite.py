from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridattn.evals.pareto import run_suite
from hybridattn.evals.pareto.suite import Suite
from hybridattn.evals.recall import mqar
from hybridattn.evals.recall.training_pool import Job, Trained, train_one
from hybridattn.evals.report import store
from hybridattn.evals.report.build import summarize
from hybridattn.evals.report.rows import TIMED, problems
from hybridattn.evals.report.store import Store
from hybridattn.evals.speed import latency

# Per model: what it is, two caches, the largest batch; twice three prefills, three decodings and a training.
MEASURED = 1 + 2 + 1 + 2 * (3 + 3 + 1)
SEEDS = 2


def dates(out: Path) -> dict[str, str]:
    """Return the date of every measurement, by key."""
    return {each["config_sha256"]: each["date"] for each in store.read(out)}


def only(suite: Suite, *names: str, **changes: Any) -> Suite:
    """Return a suite with some of the models that only times prefill."""
    models = {name: suite.models[name] for name in names}
    small = {"models": models, "state": (), "decode": (), "training": (), "memory": None, "seeds": (0,)}
    return replace(suite, **{**small, **changes})


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip plots and train in this process, except in the first test."""
    if "interrupted" not in request.node.name:
        monkeypatch.setattr(run_suite, "train_all", train_here)
        monkeypatch.setattr(run_suite, "build", lambda out, title: summarize(store.read(out)))


def train_here(jobs: list[Job], on_done: Callable[[int, Trained], None]) -> None:
    """Train all jobs as `train_all` does, but in this process."""
    for i, job in enumerate(jobs):
        on_done(i, train_one(job, lambda: None))


def measure(suite: Suite, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Run a suite and return its rows."""
    return run_suite.run_suite(suite, out, title="t", **options)["rows"]


@pytest.mark.slow
def test_an_interrupted_run_leaves_a_report_and_resumes(
    tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A resumed run repeats the interrupted second round, and no other measurement."""
    calls = 0

    def interrupted(model: Any, **options: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 11:  # in the second round: the first has three decodings of three models
            raise KeyboardInterrupt
        return decode(model, **options)

    decode = latency.decode
    monkeypatch.setattr(latency, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny, tmp_path)
    monkeypatch.undo()
    before = dates(tmp_path)
    assert 2 * SEEDS + 3 * 10 < len(before) < 2 * SEEDS + 3 * MEASURED
    assert "| Llama" in (tmp_path / "report.md").read_text()
    told = capsys.readouterr().out
    assert "A round takes" in told
    printed = [line for line in told.splitlines() if "tokens/s" in line]
    assert [line.partition(":")[0] for line in printed] == list(tiny.models)

    found = measure(tiny, tmp_path)
    after = dates(tmp_path)
    assert len(after) == 2 * SEEDS + 3 * MEASURED
    kept = {each["config_sha256"] for each in store.read(tmp_path) if each["config"].get("round") != 1}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert all(after[name] > before[name] for name in before if name not in kept)
    check_rows(tiny, found, tmp_path)
    measure(tiny, tmp_path)
    assert dates(tmp_path) == after


def check_rows(tiny: Suite, rows: list[dict[str, Any]], out: Path) -> None:
    """Check that every row has all measurements, and that the timed models have the trained weights."""
    found = {row["config"]["name"]: row for row in rows}
    assert list(found) == list(tiny.models)
    assert problems(rows) == []
    for name, row in found.items():
        assert list(row["state"]) == ["16", "64"]
        assert [each["tokens"] for each in row["prefill"]] == [64, 128, 256]
        assert [(each["tokens"], each["batch"]) for each in row["decode"]] == [(32, 1), (32, 2), (64, 1)]
        for each in (each for kind in TIMED for each in row[kind]):
            assert each["samples"] == 6
            assert len(each["rounds"]) == 2
            assert (each["speedup"] is None) == (name == "softmax attention")
        assert row["prefill_exponent"] is not None
        assert row["decode_growth"] > 0
        assert row["largest_batch"]["batch"] >= 1
        assert set(row["recall"]) == ({"8", "16", "32"} if name != "Llama" else set())
    assert found["Llama"]["facts"]["attention_operators"] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert found["GLA"]["state"]["16"]["allocated"] == found["GLA"]["state"]["64"]["allocated"]
    for name in ("GLA", "softmax attention"):
        model = run_suite.model_of(tiny, name, Store(out))
        config, _ = next(run_suite.trainings(tiny, name))
        stored = Store(out).get("recall", config)
        assert stored is not None
        with torch.inference_mode():
            assert mqar.recall(model, 8) == stored["recall"]["8"]


def test_parts_train_and_the_whole_is_measured_in_one_run(tiny: Suite, tmp_path: Path):
    small = only(tiny, "softmax attention", "GLA", rounds=1, prefill=(32,))
    for part in (1, 2):
        (row,) = measure(small, tmp_path / f"{part}", shard=(part, 2))
        assert (row["label"], row["prefill"]) == (list(small.models)[part - 1], [])
    store.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "both")
    trained = dates(tmp_path / "both")
    assert [row["label"] for row in measure(small, tmp_path / "both")] == ["softmax attention", "GLA"]
    assert {name: date for name, date in dates(tmp_path / "both").items() if name in trained} == trained


def test_a_model_that_is_added_is_compared_in_rounds_of_its_own(tiny: Suite, tmp_path: Path):
    (alone,) = measure(only(tiny, "Llama", prefill=(32,)), tmp_path)
    assert (alone["baseline"], alone["prefill"][0]["speedup"]) == ("Llama", None)
    llama, ours = measure(only(tiny, "Llama", "softmax attention", prefill=(32,)), tmp_path)
    assert ours["baseline"] == "Llama"
    assert llama["prefill"][0]["rounds"].keys() == ours["prefill"][0]["rounds"].keys() != alone["prefill"][0]["rounds"]
    assert ours["prefill"][0]["speedup"] is not None


@pytest.mark.slow
def test_the_model_that_is_timed_is_one_of_the_best_rate(tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recalls = {0.5: 0.1, 0.25: 0.9, 0.125: 0.2}

    def trained(jobs: list[Job], on_done: Callable[[int, Trained], None]) -> None:
        for i, job in enumerate(jobs):
            result = train_one(job, lambda: None)
            on_done(i, result._replace(curve=[(job.steps, recalls[job.rate])]))

    monkeypatch.setattr(run_suite, "train_all", trained)
    suite = only(tiny, "GLA", rates=tuple(recalls), seeds=(3, 4), prefill=())
    (row,) = measure(suite, tmp_path)
    (best,) = (c for c, _ in run_suite.trainings(suite, "GLA") if (c["rate"], c["seed"]) == (0.25, 3))
    weights = load_file(Store(tmp_path).weights_of(best))
    assert row["learnability"]["rate"] == 0.25
    assert all(
        torch.equal(x, weights[name])
        for name, x in run_suite.model_of(suite, "GLA", Store(tmp_path)).state_dict().items()
        if name in weights
    )


@pytest.mark.slow
def test_again_times_again(tiny: Suite, tmp_path: Path):
    small = only(tiny, "GLA", "Llama", prefill=(32,), rounds=3)
    measure(small, tmp_path)
    before = dates(tmp_path)
    measure(replace(small, rounds=2), tmp_path, again=True)  # removes all timings of earlier rounds
    after = dates(tmp_path)
    again = {name for name in after if after[name] > before[name]}
    assert len(again) == 2 * (1 + 2)
    assert len(after) == len(again) + 1  # the recall measurement


def test_weights_of_another_model_are_refused(tiny: Suite, tmp_path: Path):
    small = only(tiny, "GLA", rounds=1, prefill=())
    measure(small, tmp_path)
    (weights,) = (tmp_path / "weights").iterdir()
    save_file({"nonsense": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="GLA: expected the model's weights, got missing"):
        measure(replace(small, prefill=(32,)), tmp_path)


def test_running_out_of_memory_is_a_result(tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def large(model: Any, *, tokens: int, **options: Any) -> list[float]:
        if tokens > 100:
            raise torch.OutOfMemoryError("too long")
        return [0.1]

    monkeypatch.setattr(latency, "prefill", large)
    (row,) = measure(only(tiny, "Llama"), tmp_path)
    assert [each.get("reason") for each in row["prefill"]] == [None, "out of memory", "out of memory"]
    kinds = [each["kind"] for each in store.read(tmp_path)]
    assert kinds.count("prefill") == tiny.rounds + 2  # failed measurements are not repeated
    assert row["prefill_exponent"] is None


def test_more_tokens_than_positions_is_a_result(tiny: Suite, tmp_path: Path):
    """Only learned position embeddings limit the length, not max_position_embeddings alone."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 300}
    ours = {"vocab_size": 32, "hidden_size": 8, "mixers": ["window"], "max_position_embeddings": 300}
    models = {name: {"model": {"config": config}, "steps": None} for name, config in (("GPT-2", gpt2), ("ours", ours))}
    learned, free = measure(only(tiny, models=models, prefill=(32, 301), decode=((98, 1), (99, 1))), tmp_path)
    for kind in ("prefill", "decode"):
        assert [each.get("reason") for each in learned[kind]] == [None, "it has 300 positions"]
        assert [each.get("reason") for each in free[kind]] == [None, None]


def test_other_errors_are_raised(tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(model: Any, **options: Any) -> list[float]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(latency, "prefill", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        measure(only(tiny, "Llama"), tmp_path)


@pytest.mark.parametrize(
    ("shard", "named"),
    [
        ((0, 2), "shard: expected i/n with 1 <= i <= n, got 0/2"),
        ((3, 2), "shard: expected i/n with 1 <= i <= n, got 3/2"),
        ((9, 9), "shard: expected i up to the number of models, 3, got 9/9"),
    ],
)
def test_shards_out_of_range_are_refused(tiny: Suite, tmp_path: Path, shard: tuple[int, int], named: str):
    with pytest.raises(ValueError, match=named):
        measure(tiny, tmp_path, shard=shard)


def test_a_shard_needs_models_to_train(tiny: Suite, tmp_path: Path):
    for suite, again in ((tiny, True), (only(tiny, "Llama"), False)):
        with pytest.raises(ValueError, match="shard: expected a suite with models to train"):
            measure(suite, tmp_path, shard=(1, 1), again=again)


def test_a_missing_gpu_is_refused(tiny: Suite, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="device: expected 'cpu' without a GPU, got 'cuda'"):
        measure(replace(tiny, device="cuda"), tmp_path)
