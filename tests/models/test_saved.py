"""Checkpoints of version 0.1.0, from before layers had options of their own, load and give the same logits."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hybridattn  # noqa: F401  (registers the Auto classes)

SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize("folder", [file.parent.name for file in sorted(SAVED.glob("*/model.safetensors"))])
def test_checkpoints_give_the_stored_logits(folder: str):
    model = AutoModelForCausalLM.from_pretrained(SAVED / folder)
    with torch.no_grad():
        logits = model(torch.arange(10)[None]).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(json.loads((SAVED / folder / "logits.json").read_text())))


@pytest.mark.parametrize("folder", [folder.name for folder in sorted(SAVED.iterdir())])
def test_configurations_are_saved_unchanged(folder: str, tmp_path: Path):
    AutoConfig.from_pretrained(SAVED / folder).save_pretrained(tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (SAVED / folder, tmp_path))
    del before["transformers_version"], after["transformers_version"]
    assert after == before
