import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridattn.evals.speed import models
from hybridattn.models.decoder import HybridAttnForCausalLM

LLAMA = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PLACE = {"dtype": torch.float32, "device": "cpu"}


def test_a_name_is_a_preset_or_else_a_path():
    assert models.named("gla_340m") == {"preset": "gla_340m"}
    assert models.named("folder/gla_340m") == {"path": "folder/gla_340m"}


def test_a_folder_is_known_by_what_it_holds(tmp_path: Path):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    given = {"path": str(tmp_path)}
    first = models.definition(given)
    assert first == models.definition(given) != given
    (tmp_path / "model.safetensors").write_bytes(b"other")
    second = models.definition(given)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert len({each["files"] for each in (first, second, models.definition(given))}) == 3


def test_a_path_without_a_model_is_named(monkeypatch: pytest.MonkeyPatch):
    def nothing(path: str, **options: object) -> None:
        raise OSError(f"{path} is not there")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", nothing)
    with pytest.raises(ValueError, match="model: expected a preset, a folder or a name on the Hub, got 'none/such'"):
        models.build({"path": "none/such"}, **PLACE)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, r"model: expected one of preset, path and config, got \[\]"),
        ({"preset": "gla_340m", "path": "x"}, "model: expected one of"),
        ({"path": 3}, "path: expected a folder or a name on the Hub, got 3"),
        ({"preset": "gla_340b"}, "preset: expected one of .*'gla_340m'.*, got 'gla_340b'"),
    ],
)
def test_wrong_definitions_are_named(given: dict, named: str):
    with pytest.raises(ValueError, match=named):
        models.definition(given)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"path: expected a folder with config\.json"):
        models.definition({"path": str(tmp_path)})


def test_any_model_can_be_measured(tmp_path: Path):
    stored = LlamaForCausalLM(LlamaConfig(**LLAMA))
    stored.save_pretrained(tmp_path)
    loaded = models.build({"path": str(tmp_path)}, **PLACE)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(stored.state_dict()))
    assert not loaded.training
    (tmp_path / "model.safetensors").unlink()
    first, second = (models.build({"path": str(tmp_path)}, **PLACE, seed=n) for n in (0, 1))
    assert type(first) is LlamaForCausalLM
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert type(models.build({"config": {"model_type": "llama", **LLAMA}}, **PLACE)) is LlamaForCausalLM


def test_configurations_of_ours_need_no_type():
    fields = {"vocab_size": 32, "hidden_size": 16, "mixers": ["gla"], "mixer_options": {"gla": {"num_heads": 1}}}
    assert type(models.build({"config": fields}, dtype=torch.bfloat16, device="cpu")) is HybridAttnForCausalLM
    assert models.configuration({"preset": "gla_340m"}).model_type == "gla"
