"""Checkpoints saved by commit db413cf, before layers had options of their own, load and give the same logits."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hybridattn  # noqa: F401  (registers the Auto classes)

SAVED = Path(__file__).parent / "saved"


@pytest.mark.parametrize("folder", ["hybrid", "windows", "gla", "based"])
def test_checkpoints_give_the_stored_logits(folder: str):
    model = AutoModelForCausalLM.from_pretrained(SAVED / folder)
    with torch.no_grad():
        logits = model(torch.arange(10)[None]).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(json.loads((SAVED / folder / "logits.json").read_text())))


@pytest.mark.parametrize("folder", ["hybrid", "windows", "gla", "based", "based_360m", "jrt_360m"])
def test_configurations_are_saved_unchanged(folder: str, tmp_path: Path):
    AutoConfig.from_pretrained(SAVED / folder).save_pretrained(tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (SAVED / folder, tmp_path))
    del before["transformers_version"], after["transformers_version"]
    assert after == before
