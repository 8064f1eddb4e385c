import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridattn.evals import demo
from hybridattn.evals.pareto import suite
from hybridattn.measure.provenance import json_sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds: expected a positive integer, got 0"),
        ({"seeds": 1.5}, "seeds: expected a positive integer, got 1.5"),
        ({"steps": -1}, "steps: expected a positive integer, got -1"),
        ({"steps": True}, "steps: expected a positive integer, got True"),
        ({"rounds": 0}, "rounds: expected a positive integer, got 0"),
        ({"only": ["text", "music"]}, r"only: expected parts of \['text', 'recall'\], got 'music'"),
        ({"only": "music"}, r"only: expected parts of \['text', 'recall'\], got 'music'"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        demo.run(out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_recall_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"matplotlib: pip install hybridattn\[demo\]"):
        demo.run(out=tmp_path / "out", only=["recall"])


def test_other_peoples_files_are_refused_before_any_work(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="out: expected a new path"):
        demo.run(out=tmp_path)


def test_parts_run_in_their_own_order():
    assert demo.check_parts(None) == demo.check_parts([]) == demo.check_parts(["recall", "text"]) == ["text", "recall"]
    assert demo.check_parts("recall") == ["recall"]


def test_an_interrupted_run_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupted(folder: Path, seeds: int, steps: int | None, rounds: int | None) -> dict:
        (folder / "model").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setitem(demo.PART_RUNS, "text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run(out=tmp_path / "out", only=["text"])
    assert list(tmp_path.iterdir()) == []


def test_a_short_run_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    cpu = suite.load("cpu", rounds=1)
    timed = {"prefill": (64, 128), "decode": ((32, 1), (32, 2)), "training": (), "memory": None, "operators": False}
    names = ("softmax attention", "GLA")
    models = {name: cpu.models[name] for name in names}
    small = replace(cpu, models=models, apart=False, seconds=0, state=(16,), looks=2, **timed)
    monkeypatch.setattr(suite, "load", lambda name, rounds: small if (name, rounds) == ("cpu", 1) else None)
    out = tmp_path / "demo"
    results = demo.run(out=out, steps=2, seeds=2, rounds=1)
    assert sorted(path.name for path in out.iterdir()) == ["model", "pareto", "report.md", "results.json"]
    assert json.loads((out / "results.json").read_text()) == results
    check_text(results["text"], out)
    assert [row["config"]["name"] for row in results["recall"]["rows"]] == list(names)
    for row in results["recall"]["rows"]:
        assert row["config"]["train"]["steps"] == 2
        assert all(share["seeds"] == 2 for share in row["recall"].values())
        assert row["state"]["16"]["formula"] == row["state"]["16"]["allocated"] > 0
    assert results["provenance"]["config_sha256"] == json_sha256(results["provenance"]["config"])
    options = {"only": ["text", "recall"], "seeds": 2, "steps": 2, "rounds": 1}
    assert results["provenance"]["config"]["options"] == options
    printed, report = capsys.readouterr().out, (out / "report.md").read_text()
    for label in names:
        assert label in printed
        assert label in report
    assert str(out) in printed
    assert {"report.html", "report.md", "results.json", "pareto.png"} <= {
        path.name for path in (out / "pareto").iterdir()
    }


def test_a_contradiction_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hybridattn.evals.pareto import run
    from hybridattn.evals.report import build

    monkeypatch.setattr(run, "run", lambda suite, out: out.mkdir())
    monkeypatch.setattr(build, "build", lambda out, title: {"rows": [], "problems": ["GLA: the cache is wrong"]})
    with pytest.raises(RuntimeError, match="GLA: the cache is wrong"):
        demo.run(out=tmp_path / "out", only=["recall"])
    assert list(tmp_path.iterdir()) == []


def check_text(text: dict, out: Path) -> None:
    """The model is there, its figures are possible, and n-gram models get better with their order."""
    scores = text["bits_per_byte"]
    assert list(scores) == ["model", "order 0", "order 1", "order 2", "order 3", "order 4"]
    assert scores["order 0"] > scores["order 1"] > scores["order 2"] > scores["order 3"]
    assert scores["order 0"] < scores["model"] < 9
    assert text["continuation"]["text"].startswith("def read_file(path):")
    assert text["continuation"]["tokens_per_second"] > 1
    assert (out / "model" / "model.safetensors").is_file()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    assert model.num_parameters() == text["parameters"]
    assert len(tokenizer) == model.config.vocab_size
