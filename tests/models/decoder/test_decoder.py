"""The decoder for every mixer and for hybrids: caches, padding, packing, generation, checkpoints, bad input."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from hybridattn.layers import decay_slopes
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.models.decoder.cache import allocated_bytes
from hybridattn.models.decoder.mixers import MIXERS
from hybridattn.models.decoder.sizes import cache_bytes, cache_elements, cache_spec
from hybridattn.models.families import (
    HybridAttnBasedConfig,
    HybridAttnDeltaNetConfig,
    HybridAttnGatedDeltaNetConfig,
    HybridAttnGLAConfig,
    HybridAttnJRTConfig,
    HybridAttnKDAConfig,
)

VOCAB, PAD, LENGTHS, TOKENS = 40, 0, (23, 17, 1), 23
OPTIONS = {
    "gla": {"num_heads": 2, "gate_bias_range": [-40.0, 4.0]},
    "window": {"num_heads": 2, "window": 5},
    "full": {"num_heads": 4, "num_key_value_heads": 2},
    "linear": {"num_heads": 2, "key_dim": 4},
    "taylor": {"num_heads": 2, "key_dim": 4},
    "prefix": {"num_heads": 2, "key_dim": 4},
    "retention": {"num_heads": 2, "norm_eps": 0.1},  # the norm magnifies the rounding error of q.k near 0 in fp32
    "lightning": {"num_heads": 2},
    "delta": {"num_heads": 2},
    "gated_delta": {"num_heads": 2, "key_dim": 4, "num_value_heads": 4},
    "kda": {"num_heads": 2},
    "mamba2": {"head_dim": 8, "state_size": 4},
}
STACKS: dict[str, dict[str, Any]] = {
    **{name: {"mixers": [name, name]} for name in MIXERS},
    "hybrid": {"mixers": ["conv", "gla", "window", "full", "linear"], "input_conv_size": 4},
    "prefix hybrid": {"mixers": ["conv", "prefix", "window", "prefix"], "input_conv_size": 3},
    "options": {
        "mixers": ["full", "window", "gla"],
        "mixer_options": {
            "gla": {"num_heads": 2, "gate_per": "head"},
            "full": {"num_heads": 4, "num_key_value_heads": 2, "alibi": True, "rope_theta": None, "softcap": 5.0},
            "window": {
                "num_heads": 2,
                "window": 5,
                "sinks": True,
                "qk_norm": True,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        },
    },
    "no mlp": {"mixers": ["full", "gla"], "mlp": "none"},
    "pattern, short convolutions": {
        "mixers": "1 window : 2 gla",
        "num_hidden_layers": 3,
        "mixer_options": {
            "gla": {"num_heads": 2, "conv_size": 3, "gate_min": -0.5, "gate_bias_range": [-40.0, 4.0]},
            "window": {"num_heads": 2, "window": 5},
        },
    },
}
GLA: dict[str, Any] = {"num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, tuple[type[HybridAttnConfig], dict[str, Any]]] = {
    "gla family": (HybridAttnGLAConfig, GLA),
    "gla family, options": (
        HybridAttnGLAConfig,
        {**GLA, "use_short_conv": True, "clamp_min": -0.1, "attn": {"layers": [1], "num_heads": 2, "window_size": 5}},
    ),
    "delta net family": (HybridAttnDeltaNetConfig, {**GLA, "use_gate": True, "qk_activation": "elu"}),
    "gated delta net family": (
        HybridAttnGatedDeltaNetConfig,
        {**GLA, "head_dim": 4, "num_v_heads": 4, "attn": {"layers": [1], "num_heads": 2}},
    ),
    "kda family": (HybridAttnKDAConfig, {**GLA, "head_dim": 4, "lower_bound": -5.0}),
    "based family": (HybridAttnBasedConfig, {"mixers": ["conv", "taylor", "window"], "mixer_options": OPTIONS}),
    "jrt family": (HybridAttnJRTConfig, {"mixers": ["conv", "prefix", "window"], "mixer_options": OPTIONS}),
}


def make_config(stack: str, **changes: Any) -> HybridAttnConfig:
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "initializer": "fan_in",
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if stack in FAMILIES:
        family, fields = FAMILIES[stack]
        return family(**{**options, "intermediate_size": 32, **fields, **changes})
    return HybridAttnConfig(**{**options, "mixer_options": OPTIONS, **STACKS[stack], **changes})


def build(config: HybridAttnConfig, **changes: Any) -> HybridAttnForCausalLM:
    """Return a model of the configuration with some fields changed."""
    return AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes})).eval()


@pytest.fixture(params=STACKS)
def model(request: pytest.FixtureRequest) -> HybridAttnForCausalLM:
    return build(make_config(request.param))


# Families only have other configurations, so that most tests run without them; test_contract.py tests them all.
AND_FAMILIES = pytest.mark.parametrize("model", [*STACKS, *FAMILIES], indirect=True)


def tokens(batch: int = 3, length: int = TOKENS) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length))


def prefix(model: HybridAttnForCausalLM) -> dict[str, Tensor]:
    """Return prefix_lengths for 3 rows of TOKENS if the model has a ``prefix`` mixer (see test_prefix.py)."""
    return {"prefix_lengths": torch.tensor([9, 0, TOKENS])} if "prefix" in model.config.mixers else {}


def pad(rows: Tensor, side: str, width: int = 29) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Cut rows to LENGTHS and pad them; return ids, mask and the indices of the real tokens."""
    ids, mask, places = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.long), []
    for row, length in enumerate(LENGTHS):
        at = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "inside": torch.randperm(width)[:length].sort().values,
        }[side]
        ids[row, at], mask[row, at] = rows[row, :length], 1
        places.append(at)
    return ids, mask, places


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@AND_FAMILIES
@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1], [9, 12], list(range(8, TOKENS))])
def test_cached_equals_uncached(model: HybridAttnForCausalLM, cuts: list[int]):
    ids = tokens()
    expected, cache, parts = model(ids, use_cache=False), None, []
    assert expected.past_key_values is None
    for first, last in pairwise([0, *cuts, TOKENS]):
        out = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert cache.get_seq_length() == last
        parts.append(out.logits)
    close(torch.cat(parts, 1), expected.logits)


@AND_FAMILIES
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_changes_no_token(model: HybridAttnForCausalLM, side: str):
    rows = tokens()
    ids, mask, places = pad(rows, side)
    whole = model(ids, attention_mask=mask).logits
    out = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
    cache, parts = out.past_key_values, [out.logits]
    for first, last in ((20, 24), (24, 25), (25, 26), (26, 27), (27, 28), (28, 29)):
        parts.append(model(ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits)
    cached = torch.cat(parts, 1)
    for row, (at, length) in enumerate(zip(places, LENGTHS, strict=True)):
        alone = model(rows[row, None, :length]).logits[0]
        close(whole[row, at], alone)
        close(cached[row, at], alone)


@pytest.mark.parametrize("side", ["left", "inside"])
def test_padding_changes_no_gradient(model: HybridAttnForCausalLM, side: str):
    ids, mask, _ = pad(tokens(), side)
    other = torch.where(mask.bool(), ids, 7)  # other ids as padding must not change the result
    losses, grads = [], []
    for padded in (ids, other):
        embeds = model.model.embed_tokens(padded).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()]
        model.zero_grad()
        logits.square().mean().backward()
        losses.append(logits.detach())
        grads.append(embeds.grad)
        assert not embeds.grad[~mask.bool()].any()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_packed_rows_equal_separate_rows(model: HybridAttnForCausalLM):
    lengths = [5, 1, 11]
    rows = [tokens(1, n) for n in lengths]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(torch.cat(rows, 1), cu_seq_lens_q=ends.int(), position_ids=positions).logits[0]
    for part, row in zip(packed.split(lengths), rows, strict=True):
        close(part, model(row).logits[0])


@pytest.mark.parametrize(
    ("model", "options"),
    [(name, {"num_beams": beams, "do_sample": False}) for name in STACKS for beams in (1, 3)]
    + [("hybrid", {"do_sample": True, "top_k": 5})],
    indirect=["model"],
)
def test_generate_left_padded_batch_equals_alone(model: HybridAttnForCausalLM, options: dict[str, Any]):
    rows = tokens()
    ids, mask, _ = pad(rows, "left")
    if options["do_sample"]:  # random draws differ between batches, so only the greedy choice can be compared
        options = {**options, "temperature": 1e-4}
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=-1, **options)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(rows[row, None, :length], max_new_tokens=9, eos_token_id=-1, **options)
        assert torch.equal(batch[row, ids.shape[1] :], alone[0, length:])


def test_generate_equals_recomputing_every_token(model: HybridAttnForCausalLM):
    ids = tokens(2, 6)
    expected = ids
    for _ in range(12):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1), expected)
    uncached = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1, use_cache=False)
    assert torch.equal(uncached, expected)


def test_a_returned_cache_can_be_continued(model: HybridAttnForCausalLM):
    ids = tokens(2, 6)
    first = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1, return_dict_in_generate=True)
    more = torch.cat((first.sequences, tokens(2, 3)), 1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(more)}
    continued = model.generate(more, past_key_values=first.past_key_values, **options)
    assert torch.equal(continued, model.generate(more, **options))


@AND_FAMILIES
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_equal_the_formula(model: HybridAttnForCausalLM, dtype: torch.dtype):
    model.to(dtype)
    for batch, length in ((1, 3), (4, 11)):
        cache = model(tokens(batch, length), use_cache=True).past_key_values
        assert allocated_bytes(cache) == cache_bytes(model.config, batch_size=batch, tokens=length, dtype=dtype)


def test_state_elements_of_a_known_shape():
    """GLA stores K x V elements per head, a window layer its keys and values, a full layer those of all tokens."""
    config = make_config("hybrid", mixers=["gla", "window", "full"], input_conv_size=None)
    specs = cache_spec(config, batch_size=1, tokens=100, dtype=torch.bfloat16)
    assert [cache_elements(spec) for spec in specs] == [2 * 4 * 8, 2 * 5 * 16, 2 * 100 * 2 * 4]


@torch.no_grad()
def test_cache_rows_can_be_selected_and_repeated(model: HybridAttnForCausalLM):
    ids = tokens()
    cache = model(ids[:, :10], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    out = model(ids[[2, 0], 10:], past_key_values=cache).logits
    close(out, model(ids[[2, 0]]).logits[:, 10:])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(model(ids[:1, :4], past_key_values=cache).logits, model(ids[:1, :4]).logits)


@AND_FAMILIES
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(model: HybridAttnForCausalLM, tied: bool, tmp_path: Path):
    model = build(model.config, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_parameters_missing_from_a_checkpoint_are_initialised(tmp_path: Path):
    """Loading builds on the meta device, so that _init_weights must initialise parameters missing from the file."""
    config = make_config("hybrid", mixers=["gla"], input_conv_size=4)
    model = HybridAttnForCausalLM(config)
    kept = {k: v for k, v in model.state_dict().items() if "gk_proj" not in k and "conv" not in k}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(p.isfinite().all() for p in loaded.parameters())
    bias = loaded.model.layers[0].mixer.gk_proj.up.bias
    assert bias.min() >= -40
    assert bias.max() <= 4
    assert bias.std() > 1
    assert 0.1 < loaded.model.layers[0].conv.weight.std() < 1


def test_loading_initialises_constants_and_special_parameters(tmp_path: Path):
    """Constants, which files never contain, and missing parameters with initialisations of their own."""
    model = HybridAttnForCausalLM(make_config("options", mixers=["lightning", "full", "window", "gla"]))
    own = ("sinks", "A_log", "dt_bias")
    kept = {k: v for k, v in model.state_dict().items() if not k.endswith(own)}
    assert len(kept) == len(model.state_dict()) - 3
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    lightning, full, window, gla = (layer.mixer for layer in loaded.model.layers)
    assert lightning.slopes().tolist() == [2, 4, 6, 8]
    assert full.alibi().tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert not window.sinks.any()
    assert ((gla.gk_proj.A_log > -0.01) & (gla.gk_proj.A_log < 2.79)).all()
    assert ((gla.gk_proj.dt_bias > -7) & (gla.gk_proj.dt_bias < -2.2)).all()


def test_loading_initialises_delta_rules_and_mamba_2(tmp_path: Path):
    """The initial values of the published code."""
    entries = [{"mixer": "kda", "num_heads": 2, "lower_bound": -5.0}, "gated_delta", "kda", "mamba2"]
    model = HybridAttnForCausalLM(make_config("options", mixers=entries, mixer_options=OPTIONS))
    own = ("A_log", "dt_bias", "mixer.D", "norm_weight")
    kept = {k: v for k, v in model.state_dict().items() if not k.endswith(own)}
    assert len(kept) == len(model.state_dict()) - 10
    model.save_pretrained(tmp_path, state_dict=kept)
    bounded, gated, kda, mamba = (layer.mixer for layer in AutoModelForCausalLM.from_pretrained(tmp_path).model.layers)
    assert not bounded.gk_proj.A_log.any()
    for decay, low in ((gated.gk_proj, 0), (kda.gk_proj, 1), (mamba.decay, 1)):
        assert ((decay.A_log.exp() >= low) & (decay.A_log.exp() <= 16)).all()
        dt = torch.nn.functional.softplus(decay.dt_bias)
        assert ((dt > 0.99e-3) & (dt < 0.101)).all()
    assert (mamba.D == 1).all()
    assert (mamba.norm_weight == 1).all()


def test_slopes_know_their_layer():
    layers = HybridAttnForCausalLM(make_config("lightning", mixers=["lightning", "full", "lightning"])).model.layers
    assert layers[0].mixer.slopes.numbers == decay_slopes("transnormer", 2, 0, 3)
    assert layers[2].mixer.slopes.numbers == decay_slopes("transnormer", 2, 2, 3)


@AND_FAMILIES
def test_loss_and_gradients_reach_every_parameter(model: HybridAttnForCausalLM):
    ids = tokens()
    out = model(ids, labels=ids, **prefix(model))
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing(model: HybridAttnForCausalLM):
    ids, grads = tokens(), []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model.zero_grad()
        model(ids, labels=ids, **prefix(model)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_trainer(tmp_path: Path):
    """transformers' Trainer lowers the loss of a hybrid, saves a checkpoint and resumes from it."""
    model = HybridAttnForCausalLM(make_config("hybrid"))
    rows = [
        {"input_ids": row, "labels": row} for row in torch.arange(2, 18).repeat(8, 2).unfold(1, 16, 5).flatten(0, 1)
    ]
    options = {
        "output_dir": tmp_path,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
        "save_steps": 6,
        "logging_steps": 6,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    first = Trainer(model, TrainingArguments(max_steps=12, **options), train_dataset=rows)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[1] < 0.8 * losses[0]
    again = Trainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6"),
        TrainingArguments(max_steps=12, **options),
        train_dataset=rows,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@AND_FAMILIES
def test_backends_agree(model: HybridAttnForCausalLM):
    reference = build(model.config, backend="reference")
    reference.load_state_dict(model.state_dict())
    ids = tokens()
    close(model(ids).logits, reference(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_logits_to_keep_and_hidden_states(model: HybridAttnForCausalLM):
    ids = tokens()
    out = model(ids, logits_to_keep=2, output_hidden_states=True)
    close(out.logits, model(ids).logits[:, -2:])
    assert len(out.hidden_states) == len(model.config.mixers) + 1


@torch.no_grad()
def test_position_ids_with_padding():
    model = HybridAttnForCausalLM(make_config("full")).eval()
    rows = tokens()
    ids, mask, places = pad(rows, "inside")
    positions = torch.zeros_like(ids)
    for row, at in enumerate(places):
        positions[row, at] = 3 * torch.arange(len(at))
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, (at, length) in enumerate(zip(places, LENGTHS, strict=True)):
        close(padded[row, at], model(rows[row, None, :length], position_ids=positions[row, None, at]).logits[0])
    assert not torch.allclose(padded[0, places[0]], model(rows[:1]).logits[0], atol=1e-3)


@torch.no_grad()
def test_the_input_convolution_is_added():
    """With zero weights it has no effect; with identity weights it doubles the mixer's input."""
    plain = HybridAttnForCausalLM(make_config("linear")).eval()
    model = HybridAttnForCausalLM(make_config("linear", input_conv_size=3)).eval()
    assert all("conv" in name for name in model.load_state_dict(plain.state_dict(), strict=False).missing_keys)
    ids, convolutions = tokens(), [layer.conv for layer in model.model.layers]
    for conv in convolutions:
        conv.weight.zero_()
    close(model(ids).logits, plain(ids).logits)
    for conv, layer in zip(convolutions, plain.model.layers, strict=True):
        conv.weight[:, :, -1] = 1
        layer.input_layernorm.weight *= 2
    close(model(ids).logits, plain(ids).logits)


def test_initial_weights_have_the_published_spread():
    fan_in = HybridAttnForCausalLM(make_config("full", hidden_size=64, intermediate_size=512, vocab_size=999))
    mlp = fan_in.model.layers[0].mlp
    assert mlp.up_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert mlp.down_proj.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert fan_in.model.embed_tokens.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    normal = HybridAttnForCausalLM(make_config("full", hidden_size=64, initializer="normal", initializer_range=0.3))
    assert normal.model.layers[0].mixer.q_proj.weight.std().item() == pytest.approx(0.3, rel=0.05)


@torch.no_grad()
def test_an_empty_piece_changes_nothing(model: HybridAttnForCausalLM):
    ids = tokens()
    cache = model(ids[:, :9], use_cache=True).past_key_values
    assert model(ids[:, 9:9], past_key_values=cache).logits.shape == (3, 0, VOCAB)
    close(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])


BAD_CONFIGS = {
    "no mixers": ({"mixers": []}, r"mixers: expected a list with a mixer for each layer, got \[\]"),
    "layers": ({"num_hidden_layers": 7}, r"num_hidden_layers: expected 5 \(one per mixer\), got 7"),
    "mlp": ({"mlp": "gelu"}, r"mlp: expected one of \['swiglu', 'none'\], got 'gelu'"),
    "initializer": ({"initializer": "zero"}, r"initializer: expected one of \['normal', 'fan_in'\], got 'zero'"),
    "backend": ({"backend": "cuda"}, r"backend: expected one of \['reference', 'torch', 'triton', None\], got 'cuda'"),
    "state dtype": ({"state_dtype": "int8"}, "state_dtype: expected one of .*, got 'int8'"),
    "vocabulary": ({"vocab_size": -1}, "vocab_size: expected a positive number, got -1"),
    "size": ({"hidden_size": 0}, "hidden_size: expected a positive number, got 0"),
    "inner size": ({"intermediate_size": -4}, "intermediate_size: expected a positive number, got -4"),
    "padding token": ({"pad_token_id": VOCAB}, r"pad_token_id: expected 0 to 39 \(vocab_size - 1\), got 40"),
    "pattern": ({"mixers": "1 full, 2 gla"}, "mixers: expected a pattern like '1 full : 7 gla', got '1 full, 2 gla'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_errors_name_bad_configurations(name: str):
    changes, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        make_config("hybrid", **changes)


def test_errors_name_bad_calls():
    model, ids = HybridAttnForCausalLM(make_config("hybrid")), tokens()
    with pytest.raises(ValueError, match="input_ids: expected either input_ids or inputs_embeds, got neither"):
        model()
    with pytest.raises(
        ValueError, match=r"past_key_values: expected DynamicCache\(config=model.config\) with 5 layers"
    ):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[3, 23\], got \[3, 5\]"):
        model(ids, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="attention_mask: expected 1 for real tokens and 0 for padding, got negative"):
        model(ids, attention_mask=torch.full((3, TOKENS), -1e9))
    with pytest.raises(ValueError, match="position_ids: expected ascending positions without cu_seq_lens_q"):
        model(ids[:1], position_ids=torch.tensor([[*range(10), *range(13)]]))
    with pytest.raises(ValueError, match="cu_seqlens: expected one packed row"):
        HybridAttnForCausalLM(make_config("conv"))(ids, cu_seq_lens_q=torch.tensor([0, TOKENS]))
    with pytest.raises(ValueError, match="attention_mask: expected no padding with cu_seq_lens_q, got zeros"):
        model(ids[:1], attention_mask=torch.zeros(1, TOKENS), cu_seq_lens_q=torch.tensor([0, TOKENS]))
    with pytest.raises(ValueError, match=r"assisted|stateful"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=2)
