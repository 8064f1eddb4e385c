import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridattn.evals import demo
from hybridattn.evals.report import store
from hybridattn.evals.text import language_model
from hybridattn.training.byte_corpus import standard_library


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps: expected a positive integer, got -1"),
        ({"steps": True}, "steps: expected a positive integer, got True"),
        ({"only": ["text", "music"]}, r"only: expected parts of \['text', 'recall'\], got 'music'"),
        ({"only": "music"}, r"only: expected parts of \['text', 'recall'\], got 'music'"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        demo.run_demo(out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_it_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"matplotlib.*; pip install 'hybridattn\[demo\]'"):
        demo.run_demo(out=tmp_path / "out")


def test_a_report_of_another_kind_is_refused_at_the_start(tmp_path: Path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="out: expected a new path"):
        demo.run_demo(out=tmp_path)


def test_it_trains_eight_models_in_minutes():
    suite = demo.suite()
    mixers = {mixer for entry in suite.models.values() for mixer in entry["model"]["config"]["mixers"]}
    assert len(suite.models) == 8
    assert mixers == {"conv", "full", "window", "linear", "taylor", "gla"}
    assert any({"full", "gla"} <= set(entry["model"]["config"]["mixers"]) for entry in suite.models.values())
    assert len(suite.seeds) == 1
    assert max(suite.prefill) * suite.rounds <= 2**16


@pytest.mark.slow
def test_a_short_run_writes_everything_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    full = demo.suite(steps=2)
    names = ("softmax attention", "GLA")
    small = {"prefill": (64, 128), "decode": ((32, 1), (32, 2)), "state": (16,), "rounds": 2, "seconds": 0}
    suite = replace(full, models={name: full.models[name] for name in names}, **small)
    monkeypatch.setattr(demo, "suite", lambda steps: suite)
    corpus = standard_library()
    few = replace(corpus, train=corpus.train[:500_000], held_out=corpus.held_out[:30_000])
    monkeypatch.setattr(language_model, "standard_library", lambda: few)
    out = tmp_path / "demo"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hybridattn.evals.pareto.run_suite.measure_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(out=out, steps=2)
    report = (out / "report.md").read_text()
    assert "## A language model on real text" in report
    assert "| GLA" in report  # trained, but not measured yet

    with monkeypatch.context() as patched:
        patched.setattr(language_model, "measure", interrupted)  # must not be called: its results are stored
        results = demo.run_demo(out=out, steps=2, only="recall")
        assert demo.run_demo(out=out, steps=2, only="text") == results
    assert {path.name for path in out.iterdir()} >= {"model", "weights", "report.html", "report.md", "pareto.png"}
    assert json.loads((out / "results.json").read_text()) == results
    check_text(results["language_model"], out)
    assert [row["config"]["name"] for row in results["rows"]] == list(names)
    for row in results["rows"]:
        assert row["config"]["train"]["steps"] == 2
        assert row["state"]["16"]["formula"] == row["state"]["16"]["allocated"] > 0
    assert [each["kind"] for each in store.read(out)].count("recall") == 2
    printed, report = capsys.readouterr().out, (out / "report.md").read_text()
    for label in names:
        assert f"{label}: recall" in printed
        assert label in report


def test_the_text_in_the_report_is_of_the_model_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The report shows the text of the latest run, also after a run with another number of steps in between."""
    text = {"bits_per_byte": {"model": 1.0}, "continuation": {"text": "x", "tokens_per_second": 1.0}}

    def measured(folder: Path, steps: int | None) -> dict:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(str(steps))
        return {**text, "steps": steps}

    monkeypatch.setattr(language_model, "measure", measured)
    for steps in (7, 2, 7, 7):
        demo.measure_text(store.Store(tmp_path), steps)
        assert (tmp_path / "model" / "config.json").read_text() == str(steps)
        assert store.read(tmp_path)[-1]["figures"]["steps"] == steps


def check_text(text: dict, out: Path) -> None:
    """The model is saved, its values are plausible, and n-gram models improve with their order."""
    scores = text["bits_per_byte"]
    assert list(scores) == ["model", "order 0", "order 1", "order 2", "order 3", "order 4"]
    assert scores["order 0"] > scores["order 1"] > scores["order 2"] > scores["order 3"]
    assert scores["order 0"] < scores["model"] < 9
    assert text["continuation"]["text"].startswith("def read_file(path):")
    assert text["continuation"]["tokens_per_second"] > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    assert model.num_parameters() == text["parameters"]
    assert len(tokenizer) == model.config.vocab_size
