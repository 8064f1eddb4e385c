"""The shipped configurations, defaults, and overrides."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hybridattn.models.decoder import HybridAttnForCausalLM
from hybridattn.training.arguments import CONFIGS, parse, shipped
from hybridattn.training.byte_corpus import byte_tokenizer
from hybridattn.training.model_setup import new_config

# Learning rate first and last; tokens per step.
PUBLISHED = {
    "gla_340m": (3e-4, 3e-5, 2**19),
    "gla_1b3": (3e-4, 3e-5, 2**21),
    "hybrid_340m": (3e-4, 3e-5, 2**19),
    "based_360m": (8e-4, 8e-5, 2**19),
    "based_1b3": (8e-4, 8e-5, 2**19),
    "transformer_360m": (8e-4, 8e-5, 2**19),
}
PARAMETERS = {
    "gla_340m": 341_707_776,
    "gla_1b3": 1_299_978_240,
    "hybrid_340m": 341_631_744,
    "based_360m": 362_655_744,
    "based_1b3": 1_349_531_904,
    "transformer_360m": 359_801_856,
    "tiny_cpu": 833_152,
}


def test_shipped_configurations():
    assert set(shipped()) == {*PUBLISHED, "tiny_cpu", "finetune_lora", "linearize", "tiny_llama"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str):
    model, data, run = parse([name, "--dataloader_pin_memory", "false"])
    first, last, tokens = PUBLISHED[name]
    assert (model.preset, run.learning_rate, run.lr_scheduler_kwargs) == (name, first, {"min_lr": last})
    assert run.rows_per_step * data.length == tokens
    assert run.gradient_accumulation_steps * run.per_device_train_batch_size == run.rows_per_step
    assert (run.adam_beta1, run.adam_beta2, run.max_grad_norm, run.bf16) == (0.9, 0.95, 1.0, True)


@pytest.mark.parametrize("name", [*PUBLISHED, "tiny_cpu"])
def test_configurations_make_models_of_the_right_size(name: str):
    arguments = parse([name])[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(new_config(arguments.preset, arguments.config or {}))
    assert model.num_parameters() == PARAMETERS[name]


def test_defaults(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: gla_340m\ntokenizer: bytes\nmax_steps: 5\n")
    _, data, run = parse([str(path)])
    assert (run.lr_scheduler_type, run.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (run.adam_beta2, run.learning_rate, data.length, data.shuffle) == (0.95, 3e-4, 2048, 1000)


def test_fields_over_a_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: gla_340m\ntokenizer: bytes\nmax_steps: 5\nlearning_rate: 5e-3\nfreeze: [a.*, b]\n")
    model, data, run = parse(
        [str(path), "--length", "16", "--max_steps=7", "--bf16", "--config", '{"vocab_size": 300}']
    )
    assert (data.length, run.max_steps, run.learning_rate, run.bf16) == (16, 7, 0.005, True)
    assert (model.config, model.freeze, run.output_dir) == ({"vocab_size": 300}, ["a.*", "b"], "runs/mine")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_step: 5", "max_step"),
        ("- a", "expected a mapping of fields"),
        ("a: [", "expected YAML"),
        ("", "got neither"),
        ("preset: gla_340m", "tokenizer: expected"),
        ("preset: gla_340m\ntokenizer: bytes", "max_steps"),
        ("preset: gla_340m\ntokenizer: bytes\nmax_steps: 2\nfp16: true", "fp16"),
        ("preset: gla_340m\ntokenizer: bytes\nmax_steps: 2\ndataloader_num_workers: 4", "dataloader_num_workers"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, named: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        parse([str(path)])


def test_missing_files():
    for arguments in ([], ["--max_steps", "3"], ["no_such"]):
        with pytest.raises(ValueError, match="tiny_cpu"):
            parse(arguments)


def test_the_tiny_model_has_the_byte_tokenizer():
    model, _, _ = parse(["tiny_cpu"])
    assert model.config is not None
    assert len(byte_tokenizer()) == model.config["vocab_size"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_its_configurations(name: str):
    from accelerate.commands.config.config_args import load_config_from_file

    path = CONFIGS / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    if name == "fsdp2":
        wrapped = yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
        assert HybridAttnForCausalLM._no_split_modules == [wrapped]
