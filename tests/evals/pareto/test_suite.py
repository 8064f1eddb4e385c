import math
from pathlib import Path

import pytest
import torch

from hybridattn.evals.pareto.suite import Suite, load
from hybridattn.evals.speed.models import build

MODEL = {"model": {"preset": "gla_340m"}, "steps": None}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_shipped_suites_hold_models_that_can_be_built(name: str):
    suite = load(name)
    assert len(suite.models) >= 8
    for entry in suite.models.values():
        with torch.device("meta"):
            model = build(entry["model"], dtype=torch.float32, device="meta")
        assert model.config.vocab_size == entry["model"]["config"]["vocab_size"]
        assert set(entry["model"]["config"]["mixer_options"]) == set(entry["model"]["config"]["mixers"])


def test_a_model_takes_from_shared_what_it_does_not_say(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        """
decode: [[128, 1], [128, 4]]
shared:
  vocab_size: 64
  hidden_size: 32
  mixer_options: {gla: {num_heads: 2, key_dim: 8}, full: {num_heads: 4}}
models:
  mine: {mixers: [gla, full], hidden_size: 16, mixer_options: {gla: {key_dim: 16}}, steps: 7}
  pattern: {mixers: "1 full:1 gla", num_hidden_layers: 2}
  published: {preset: based_360m}
  other: {config: {model_type: llama, vocab_size: 64}}
"""
    )
    suite = load(str(file))
    options = {"gla": {"num_heads": 2, "key_dim": 16}, "full": {"num_heads": 4}}
    config = {"vocab_size": 64, "hidden_size": 16, "mixers": ["gla", "full"], "mixer_options": options}
    assert suite.models["mine"] == {"model": {"config": config}, "steps": 7}
    assert set(suite.models["pattern"]["model"]["config"]["mixer_options"]) == {"full", "gla"}
    assert suite.models["published"] == {"model": {"preset": "based_360m"}, "steps": None}
    assert suite.models["other"]["model"] == {"config": {"model_type": "llama", "vocab_size": 64}}
    assert suite.decode == [[128, 1], [128, 4]]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("models: {}", "models: expected at least one"),
        ("[]", "expected a mapping with the field models"),
        ("models: {a: {preset: gla_340m}}\nspeed: 3", r"expected fields of .*'decode'.*, got \['speed'\]"),
        ("models: {a: {preset: gla_340m, path: x}}", r"models: expected 'a' with one of .*, got \['path', 'preset'\]"),
        ("models: {a: {steps: 3}}", "models: expected 'a' with one of"),
        ("models: {a: {preset: gla_340m, steps: 3}}", r"steps: expected none where preset is given \(a\), got 3"),
        ("models: {a: {mixers: [gla], steps: -3}}", r"steps: expected a positive integer \(a\), got -3"),
        ("models: {a: {preset: none_such}}", "preset: expected one of"),
        ("models: [", r"mine.yaml: expected YAML, got an error: while parsing"),
        ("models: {a: }", "models: expected a mapping of 'a', got None"),
        ("models: {a: [1]}", r"models: expected a mapping of 'a', got \[1\]"),
        ("shared: 3\nmodels: {a: {preset: gla_340m}}", "shared: expected a mapping, got 3"),
        ("models: {a: {mixers: 5}}", r"mixers: expected a list or a pattern \(a\), got 5"),
        ("models: {a: {preset: gla_340m}}\nrates: [1e-2]", r"rates: expected numbers above 0, got \['1e-2'\]"),
        ("models: {a: {preset: [x]}}", r"preset: expected one of .*, got \['x'\]"),
        ("models: {a: {mixers: [none_such]}}", r"got an error: mixers\[0\]: expected one of"),
        (
            "models: {a: {mixers: [gla], mixer_options: {gla: 5}}}",
            r"mixer_options: expected a mapping of mappings \(a\)",
        ),
        ("models: {a: {preset: gla_340m}}\n5: 3\nspeed: 3", r"expected fields of .*, got \['5', 'speed'\]"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, named: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=named):
        load(str(tmp_path / "mine.yaml"))


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match=r"suite: expected one of \['cpu', 'gpu'\] or a YAML file, got 'tpu'"):
        load("tpu")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"models": {}}, "models: expected at least one"),
        ({"device": "tpu"}, "device: expected 'cpu' or 'cuda', got 'tpu'"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"dtype": ["float32"]}, "dtype: expected one of"),
        ({"models": {"a\nb": MODEL}}, "models: expected printable names"),
        ({"models": {"_a": MODEL}}, "models: expected printable names without _ first, got '_a'"),
        ({"seconds": math.inf}, "seconds: expected a number of at least 0, got inf"),
        ({"seeds": [True]}, r"seeds: expected integers, got \[True\]"),
        ({"rates": [-1.0]}, r"rates: expected numbers above 0, got \[-1.0\]"),
        ({"procedure": "mine"}, r"procedure: expected one of \['published', 'recipe'\], got 'mine'"),
        ({"rounds": 0}, "rounds: expected a positive integer, got 0"),
        ({"prefill": [0]}, r"prefill: expected positive integers, got \[0\]"),
        ({"decode": [[1, 2, 3]]}, r"decode: expected pairs \(context, batch\)"),
        ({"decode": [[1, True]]}, r"decode: expected pairs \(context, batch\)"),
        ({"seconds": -1}, "seconds: expected a number of at least 0"),
        ({"seconds": "x"}, "seconds: expected a number of at least 0, got 'x'"),
        ({"state": 16}, "state: expected positive integers, got 16"),
        ({"decode": 3}, r"decode: expected pairs \(context, batch\) of positive integers, got 3"),
        ({"decode": [16, 1]}, r"decode: expected pairs .*, got \[16, 1\]"),
        ({"memory": 5}, "memory: expected tokens and budget, positive integers, got 5"),
        ({"memory": {"tokens": 16, "budget": "1e8"}}, "memory: expected tokens and budget, positive integers"),
        ({"memory": {"tokens": -3, "budget": 4}}, "memory: expected tokens and budget, positive integers"),
        ({"seeds": 2}, "seeds: expected integers, got 2"),
        ({"rates": 0.01}, "rates: expected numbers above 0, got 0.01"),
        ({"graphs": True}, "graphs: expected false on a CPU, got True"),
        ({"memory": {"tokens": 3}}, "memory: expected tokens and budget"),
        ({"models": {"a": {**MODEL, "steps": 1}}, "seeds": []}, "seeds: expected at least one"),
        ({"models": {"a": {**MODEL, "steps": 1}}, "rates": []}, "rates: expected at least one"),
    ],
)
def test_wrong_options_are_named(options: dict, named: str):
    with pytest.raises(ValueError, match=named):
        Suite(**{"models": {"a": MODEL}, **options})
