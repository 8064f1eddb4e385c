import pytest
import torch
from transformers import LlamaForCausalLM

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.training.arguments import ModelArguments
from hybridattn.training.model_setup import build_config, build_model, build_tokenizer, new_config

OPTIONS = {"hidden_size": 16, "mixers": ["gla", "gla"], "mixer_options": {"gla": {"num_heads": 2}}, "vocab_size": 258}


def test_a_new_model_knows_the_special_tokens():
    arguments = ModelArguments(config=OPTIONS, tokenizer="bytes")
    config = build_config(arguments, build_tokenizer(arguments))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 256, 257)


def test_freezing():
    arguments = ModelArguments(config=OPTIONS, tokenizer="bytes", freeze=["model.embed_tokens.*", "model.layers.0.*"])
    model = build_model(arguments, HybridAttnConfig(**OPTIONS))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "embed_tokens" in name or "layers.0." in name}


def test_a_saved_model_is_trained_in_fp32(tmp_path):
    HybridAttnForCausalLM(HybridAttnConfig(**OPTIONS)).to(torch.bfloat16).save_pretrained(tmp_path)
    arguments = ModelArguments(model=str(tmp_path), tokenizer="bytes", lora={"r": 2})
    model = build_model(arguments, build_config(arguments, build_tokenizer(arguments)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


@pytest.mark.parametrize("lora", [{"rank": 2}, {"target_modules": ["no_such"]}])
def test_adapters_that_do_not_fit(tmp_path, lora):
    HybridAttnForCausalLM(HybridAttnConfig(**OPTIONS)).save_pretrained(tmp_path)
    arguments = ModelArguments(model=str(tmp_path), tokenizer="bytes", lora=lora)
    with pytest.raises(ValueError, match="lora: "):
        build_model(arguments, HybridAttnConfig(**OPTIONS))


def test_a_new_model_of_transformers():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"model_type": "llama", "vocab_size": 258, "attn_implementation": "hybridattn", **sizes}
    arguments = ModelArguments(config=options, tokenizer="bytes")
    config = build_config(arguments, build_tokenizer(arguments))
    model = build_model(arguments, config)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config._attn_implementation == "hybridattn"
    assert (config.bos_token_id, config.pad_token_id, model.config.intermediate_size) == (256, 257, 24)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"model_type": "lama"}, "model_type of transformers"), ({"model_type": "llama", "mixers": []}, "LlamaConfig")],
)
def test_bad_models_of_transformers(options: dict, named: str):
    with pytest.raises(ValueError, match=named):
        new_config(None, options)
