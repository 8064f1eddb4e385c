from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hybridattn.evals.pareto import run
from hybridattn.evals.pareto.suite import Suite
from hybridattn.evals.recall import mqar
from hybridattn.evals.report import cells, rows
from hybridattn.evals.speed import measure

# Per model: what it is, two caches, the largest batch; twice three prefills, three decodings and a training.
MEASURED = 1 + 2 + 1 + 2 * (3 + 3 + 1)
SEEDS = 2


def dates(out: Path) -> dict[str, int]:
    """When every cell was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (out / cells.CELLS).iterdir()}


def test_a_suite_fills_its_cells_and_a_killed_run_goes_on(tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is killed in the middle of the second round, and what was there is not measured again."""
    calls = 0

    def killed(model: Any, **options: Any) -> measure.Samples:
        nonlocal calls
        calls += 1
        if calls > 11:  # three models' three decodings, and two more
            raise KeyboardInterrupt
        return decode(model, **options)

    decode = measure.decode
    monkeypatch.setattr(measure, "decode", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(tiny, tmp_path)
    monkeypatch.undo()
    before = dates(tmp_path)
    assert 2 * SEEDS + 3 * 10 < len(before) < 2 * SEEDS + 3 * MEASURED
    assert "samples so far" in str(rows.rows(cells.read(tmp_path)))  # half a run has no figures of its own

    run.run(tiny, tmp_path)
    after = dates(tmp_path)
    assert len(after) == 2 * SEEDS + 3 * MEASURED
    assert {name: after[name] for name in before} == before

    run.run(tiny, tmp_path)
    assert dates(tmp_path) == after

    check_rows(tiny, tmp_path)

    changed = replace(tiny, models={"GLA": {**tiny.models["GLA"], "steps": 2}}, rounds=1)
    run.run(changed, tmp_path)
    assert {name: stamp for name, stamp in dates(tmp_path).items() if name in after} == after
    assert [row["config"]["name"] for row in rows.rows(cells.read(tmp_path))] == [*tiny.models, "GLA"]


def check_rows(tiny: Suite, out: Path) -> None:
    """Every row has everything, and what is timed is what was trained."""
    found = {row["config"]["name"]: row for row in rows.rows(cells.read(out))}
    assert list(found) == list(tiny.models)
    assert rows.problems(list(found.values())) == []
    for name, row in found.items():
        assert list(row["state"]) == ["16", "64"]
        assert [each["tokens"] for each in row["prefill"]] == [64, 128, 256]
        assert [(each["tokens"], each["batch"]) for each in row["decode"]] == [(32, 1), (32, 2), (64, 1)]
        assert all(each["samples"] >= 10 for kind in ("prefill", "decode", "training") for each in row[kind])
        assert row["prefill_exponent"] is not None
        assert row["decode_growth"] > 0
        assert row["largest_batch"]["batch"] >= 1
        assert set(row["recall"]) == ({"8", "16", "32"} if name != "Llama" else set())
    assert found["Llama"]["facts"]["attention_operators"] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert found["GLA"]["state"]["16"]["allocated"] == found["GLA"]["state"]["64"]["allocated"]
    for name in ("GLA", "softmax attention"):
        model = run.model_of(tiny, name, out)
        with torch.inference_mode():
            assert mqar.recall(model, 8) == stored_recall(tiny, name, out)["8"]


def stored_recall(tiny: Suite, name: str, out: Path) -> dict[str, float]:
    """Recall of the model that was trained first."""
    config, _ = next(run.trainings(tiny, name))
    (cell,) = [cell for cell in cells.read(out) if cell["kind"] == "recall" and cell["config"] == config]
    return cell["figures"]["recall"]


def test_parts_are_the_whole(tiny: Suite, tmp_path: Path):
    small = replace(tiny, seeds=(0,), rounds=1, prefill=(32,), decode=((16, 1),), training=(), memory=None)
    for part in (1, 2):
        run.run(small, tmp_path / f"{part}", shard=(part, 2))
    run.run(small, tmp_path / "whole")
    one, two, whole = (set(dates(tmp_path / name)) for name in ("1", "2", "whole"))
    assert not one & two
    assert one | two == whole
    cells.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert set(dates(tmp_path / "merged")) == whole


def test_again_measures_again(tiny: Suite, tmp_path: Path):
    small = replace(tiny, models={"Llama": tiny.models["Llama"]}, prefill=(32,), decode=(), training=(), memory=None)
    run.run(small, tmp_path)
    before = dates(tmp_path)
    run.run(small, tmp_path, again=True)
    after = dates(tmp_path)
    assert before.keys() == after.keys()
    assert all(after[name] > before[name] for name in before)


def test_what_takes_long_is_left_out_of_late_rounds(tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ten undisturbed samples, and ten seconds of them, are enough; the other rounds go through what lacks them."""
    seconds = {64: 3.0, 128: 0.9, 256: 0.1}
    calls: Counter[int] = Counter()

    def prefill(model: Any, *, tokens: int, **options: Any) -> measure.Samples:
        calls[tokens] += 1
        is_disturbed = tokens == 64 and calls[tokens] % 2 == 0
        return measure.Samples([seconds[tokens] * (1 + is_disturbed)], [1.0 + is_disturbed], [1.0])

    monkeypatch.setattr(measure, "prefill", prefill)
    models = {"Llama": tiny.models["Llama"]}
    small = replace(tiny, models=models, rounds=25, state=(), decode=(), training=(), memory=None)
    run.run(small, tmp_path)
    (row,) = rows.rows(cells.read(tmp_path))
    assert calls == {64: 19, 128: 12, 256: 25}
    assert [(each["samples"], each["median"]) for each in row["prefill"]] == [(10, 3), (12, 0.9), (25, 0.1)]
    run.run(replace(small, rounds=10), tmp_path, again=True)  # nothing of the earlier rounds is left
    (row,) = rows.rows(cells.read(tmp_path))
    assert calls == {64: 29, 128: 22, 256: 35}
    assert [each["samples"] + each["set_aside"] for each in row["prefill"]] == [10, 10, 10]


def test_what_varies_is_timed_in_more_rounds(
    tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Until a look after every ten finds that it is known well enough, or the rounds are up."""
    seconds = {
        64: lambda turn: 0.01,
        128: lambda turn: 0.01 if turn >= 3 else 0.01 + turn / 500,
        256: lambda turn: 0.01 if turn % 2 else 0.03,
    }
    calls: Counter[int] = Counter()

    def prefill(model: Any, *, tokens: int, **options: Any) -> measure.Samples:
        taken = seconds[tokens](calls[tokens])
        calls[tokens] += 1
        return measure.Samples([taken] * 2, [1.0] * 2, [])

    monkeypatch.setattr(measure, "prefill", prefill)
    models = {"Llama": tiny.models["Llama"]}
    small = replace(tiny, models=models, rounds=5, extra_rounds=25, state=(), decode=(), training=(), memory=None)
    run.run(small, tmp_path)
    assert calls == {64: 5, 128: 15, 256: 30}
    told = [line.split() for line in capsys.readouterr().out.splitlines() if "intervals wider" in line]
    assert [(line[1], line[-1]) for line in told] == [("5", "2"), ("15", "1"), ("25", "1")]
    run.run(small, tmp_path)
    assert calls == {64: 5, 128: 15, 256: 30}
    capsys.readouterr()
    run.run(replace(small, prefill=(64,)), tmp_path / "other")
    assert calls[64] == 10
    assert capsys.readouterr().out.strip() == "after 5 rounds, intervals wider than 12% of their medians: 0"


def test_rounds_in_processes_of_their_own_fill_the_same_cells(
    tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models = {name: tiny.models[name] for name in ("GLA", "Llama")}
    small = replace(tiny, models=models, seeds=(0,), prefill=(64,), decode=(), training=(), memory=None)
    run.run(small, tmp_path / "one")

    def here(*_: Any, **__: Any) -> None:
        raise AssertionError("this process measures nothing")

    monkeypatch.setattr(measure, "prefill", here)
    run.run(replace(small, apart=True), tmp_path / "many")
    assert dates(tmp_path / "one").keys() == dates(tmp_path / "many").keys()
    monkeypatch.setattr(run, "ProcessPoolExecutor", here)  # nothing is left
    run.run(replace(small, apart=True), tmp_path / "many")


def test_what_goes_wrong_in_another_process_is_told(tiny: Suite, tmp_path: Path):
    models = {"GLA": tiny.models["GLA"]}
    small = replace(tiny, models=models, seeds=(0,), rounds=1, prefill=(64,), decode=(), training=(), memory=None)
    run.run(replace(small, prefill=()), tmp_path)
    (weights,) = (tmp_path / "weights").iterdir()
    save_file({"nonsense": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="GLA: expected the model's weights, missing"):
        run.run(replace(small, apart=True), tmp_path)


def test_running_out_of_memory_is_a_figure(tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def large(model: Any, *, tokens: int, **options: Any) -> measure.Samples:
        if tokens > 100:
            raise torch.OutOfMemoryError("too long")
        return measure.Samples([0.1] * 10, [1.0] * 10, [1.0] * 10)

    monkeypatch.setattr(measure, "prefill", large)
    small = replace(tiny, models={"Llama": tiny.models["Llama"]}, decode=(), training=(), memory=None)
    run.run(small, tmp_path)
    (row,) = rows.rows(cells.read(tmp_path))
    assert [each.get("reason") for each in row["prefill"]] == [None, "out of memory", "out of memory"]
    assert len(list((tmp_path / "cells").glob("prefill-*.json"))) == small.rounds + 2  # once is enough
    assert row["prefill_exponent"] is None


def test_more_tokens_than_positions_is_a_figure(tiny: Suite, tmp_path: Path):
    """Of learned positions only; those that a configuration just names are no limit."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 300}
    ours = {"vocab_size": 32, "hidden_size": 8, "mixers": ["window"], "max_position_embeddings": 300}
    models = {name: {"model": {"config": config}, "steps": None} for name, config in (("GPT-2", gpt2), ("ours", ours))}
    alone = replace(tiny, models=models, state=(), prefill=(32, 301), decode=((98, 1), (99, 1)), training=())
    run.run(replace(alone, memory=None), tmp_path)
    learned, free = rows.rows(cells.read(tmp_path))
    for kind in ("prefill", "decode"):
        assert [each.get("reason") for each in learned[kind]] == [None, "it has 300 positions"]
        assert [each.get("reason") for each in free[kind]] == [None, None]


def test_what_is_wrong_is_not_a_figure(tiny: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(model: Any, **options: Any) -> measure.Samples:
        raise RuntimeError("a bug")

    monkeypatch.setattr(measure, "prefill", broken)
    small = replace(tiny, models={"Llama": tiny.models["Llama"]})
    with pytest.raises(RuntimeError, match="a bug"):
        run.run(small, tmp_path)


def test_a_report_of_another_kind_is_not_overwritten(tiny: Suite, tmp_path: Path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="out: expected a new path or a folder with cells"):
        run.run(tiny, tmp_path)


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_parts_that_there_are_not(tiny: Suite, tmp_path: Path, shard: tuple[int, int]):
    with pytest.raises(ValueError, match="shard: expected i/n with 1 <= i <= n"):
        run.run(tiny, tmp_path, shard=shard)


def test_parts_without_a_model(tiny: Suite, tmp_path: Path):
    with pytest.raises(ValueError, match=r"shard: expected a part with a model, there are \d, got 9/9"):
        run.run(tiny, tmp_path, shard=(9, 9))


def test_a_gpu_that_there_is_not(tiny: Suite, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device: expected 'cpu' without a GPU, got 'cuda'"):
        run.run(replace(tiny, device="cuda"), tmp_path)
