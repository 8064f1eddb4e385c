"""Features of transformers (pipelines, peft, Trainer, plans, remote code) with every family and three hybrids.

The tests of the decoder itself are in decoder/test_decoder.py.
"""

import copy
import json
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hybridattn import (
    HybridAttnBasedConfig,
    HybridAttnConfig,
    HybridAttnDeltaNetConfig,
    HybridAttnForCausalLM,
    HybridAttnGatedDeltaNetConfig,
    HybridAttnGLAConfig,
    HybridAttnJRTConfig,
    HybridAttnKDAConfig,
)
from hybridattn.models.decoder.cache import allocated_bytes
from hybridattn.models.decoder.sizes import cache_bytes

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "initializer": "fan_in",
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 2, "gate_bias_range": [-40.0, 4.0]},
    "window": {"num_heads": 2, "window": 5},
    "full": {"num_heads": 4, "num_key_value_heads": 2},
    "taylor": {"num_heads": 2, "key_dim": 4},
    "prefix": {"num_heads": 2, "key_dim": 4},
    "lightning": {"num_heads": 2},
}
CONFIGS: dict[str, Callable[..., HybridAttnConfig]] = {
    "gla": lambda **more: HybridAttnGLAConfig(**{**SIZES, "num_hidden_layers": 2, "num_heads": 2, **more}),
    "delta net": lambda **more: HybridAttnDeltaNetConfig(
        **{**SIZES, "num_hidden_layers": 2, "num_heads": 2, "use_gate": True, **more}
    ),
    "gated delta net": lambda **more: HybridAttnGatedDeltaNetConfig(
        **{**SIZES, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 4, "num_v_heads": 4, **more}
    ),
    "kda": lambda **more: HybridAttnKDAConfig(
        **{**SIZES, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 4, "lower_bound": -5.0, **more}
    ),
    "based": lambda **more: HybridAttnBasedConfig(
        **{**SIZES, "mixers": ["conv", "taylor", "window"], "mixer_options": OPTIONS, **more}
    ),
    "jrt": lambda **more: HybridAttnJRTConfig(
        **{**SIZES, "mixers": ["conv", "prefix", "window"], "mixer_options": OPTIONS, **more}
    ),
    "full and gla": lambda **more: HybridAttnConfig(
        **{**SIZES, "mixers": "1 full : 2 gla", "mixer_options": OPTIONS, **more}
    ),
    "window and lightning": lambda **more: HybridAttnConfig(
        **{**SIZES, "mixers": ["window", "lightning"], "mixer_options": OPTIONS, **more}
    ),
    "convolutions and full": lambda **more: HybridAttnConfig(
        **{**SIZES, "mixers": ["conv", "full"], "mixer_options": OPTIONS, "input_conv_size": 3, **more}
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> HybridAttnConfig:
    return CONFIGS[request.param]()


@pytest.fixture
def model(config: HybridAttnConfig) -> HybridAttnForCausalLM:
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, whose first ids are <pad> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def ids(*shape: int) -> Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape)


def test_pipeline(model: HybridAttnForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    out = generate(["ab", "abcdef"], max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    prompt = tokenizer("ab", return_tensors="pt").input_ids
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert out[0][0]["generated_text"] == tokenizer.decode(alone[0, 2:], skip_special_tokens=True)


@torch.no_grad()
def test_sequence_classification(model: HybridAttnForCausalLM, tmp_path: Path):
    model.save_pretrained(tmp_path)
    classify = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert torch.equal(classify.model.embed_tokens.weight, model.model.embed_tokens.weight)
    rows = ids(2, 9)
    for side in ("left", "right"):
        padded = torch.cat((rows.new_zeros(2, 4), rows) if side == "left" else (rows, rows.new_zeros(2, 4)), 1)
        out = classify(padded, attention_mask=(padded != 0).long(), labels=torch.tensor([0, 2]))
        torch.testing.assert_close(out.logits, classify(rows).logits, rtol=1e-4, atol=2e-5)
        assert out.loss.isfinite()


@torch.no_grad()
def test_sharded_files(model: HybridAttnForCausalLM, tmp_path: Path):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert all(x.isfinite().all() for x in (*loaded.parameters(), *loaded.buffers()))
    rows = ids(2, 9)
    assert torch.equal(loaded(rows).logits, model(rows).logits)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed: make test-oldest")
def test_linear_layers_in_int8(run_python: Callable[..., str], tmp_path: Path):
    """torchao quantises all linear layers except the head; the logits are those of the rounded weights."""
    save_all(tmp_path)
    run_python(f"""
import torch, hybridattn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
for name in ("gla", "jrt", "full and gla"):
    folder = {str(tmp_path)!r} + "/" + name
    quantized = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map="cpu")
    exact = AutoModelForCausalLM.from_pretrained(folder)
    rows, logits = torch.load(folder + "/expected")
    for one, other in zip(model.model.modules(), exact.model.modules(), strict=True):
        if isinstance(one, torch.nn.Linear):
            assert isinstance(one.weight, Int8Tensor)
            other.weight.data = one.weight.dequantize()
    torch.testing.assert_close(model(rows).logits, exact(rows).logits, rtol=1e-3, atol=1e-4)
    assert not torch.equal(exact(rows).logits, logits)
    assert model.generate(rows, max_new_tokens=2, eos_token_id=-1).shape == (2, 11)
""")


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in CONFIGS), ("based", torch.float16), ("gla", torch.float16)]
)
def test_sixteen_bits_stay_finite(name: str, dtype: torch.dtype):
    """At 4,096 tokens with strong decays, the error is at most 1.5 times that of the token-by-token operators."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gk_proj.up.bias"):
            parameter.uniform_(-900, 4)  # log-decays down to -56 per token
    rows = ids(1, 4096)
    exact = model(rows).logits
    reference = AutoModelForCausalLM.from_config(
        type(model.config)(**{**model.config.to_dict(), "backend": "reference"})
    )
    reference.load_state_dict(model.state_dict())
    rounded, formula = model.to(dtype)(rows).logits, reference.to(dtype)(rows).logits
    assert rounded.dtype == dtype
    assert rounded.isfinite().all()
    assert (rounded - exact).norm() <= 1.5 * (formula - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_of_sixteen_bits(config: HybridAttnConfig, dtype: str):
    model = AutoModelForCausalLM.from_config(config).eval()
    small = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), "state_dtype": dtype})).eval()
    small.load_state_dict(model.state_dict())
    rows, logits = ids(2, 40), []
    for net in (model, small):
        cache = net(rows[:, :20], use_cache=True).past_key_values
        logits.append(torch.cat([net(rows[:, t : t + 1], past_key_values=cache).logits for t in range(20, 40)], 1))
        assert allocated_bytes(cache) == cache_bytes(net.config, batch_size=2, tokens=20, dtype=torch.float32) + grown(
            net.config, 40
        )
    exact, rounded = logits
    assert (rounded - exact).norm() <= 0.05 * exact.norm()
    if set(config.mixers) & {"gla", "taylor", "prefix", "lightning", "delta", "gated_delta", "kda"}:
        assert not torch.equal(rounded, exact)


def grown(config: HybridAttnConfig, tokens: int) -> int:
    """Return the bytes that full attention allocates from 20 tokens on to hold ``tokens``, in fp32 for two rows."""
    layers = config.mixers.count("full")
    full = AutoModelForCausalLM.from_config(CONFIGS["full and gla"](mixers=["full"])).eval() if layers else None
    if full is None:
        return 0
    cache = full(ids(2, 20), use_cache=True).past_key_values
    before = allocated_bytes(cache)
    for _ in range(20, tokens):
        full(ids(2, 1), past_key_values=cache)
    return layers * (allocated_bytes(cache) - before)


@torch.no_grad()
@pytest.mark.slow
def test_memory_does_not_grow_while_decoding():
    """From step 1,000 to 3,000, the cache does not grow and the process grows by less than 132 bytes per step."""
    config = CONFIGS["based"](mixers=["conv", "taylor", "window", "gla"])
    model = AutoModelForCausalLM.from_config(config).eval()
    cache, token, process = model(ids(1, 8), use_cache=True).past_key_values, ids(1, 1), psutil.Process()
    sizes = []
    for step in range(3_001):
        if step % 1_000 == 0:
            sizes.append((allocated_bytes(cache), process.memory_info().rss))
        model(token, past_key_values=cache)
    assert len({state for state, _ in sizes}) == 1
    assert sizes[-1][1] - sizes[1][1] < 2**18


def test_attention_weights_and_assisted_generation_are_refused(model: HybridAttnForCausalLM):
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(ids(1, 3), output_attentions=True)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids(1, 3), max_new_tokens=2, assistant_model=model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_lora(model: HybridAttnForCausalLM, tmp_path: Path):
    """Adapters of every linear layer train, save, load and merge; the base model does not change."""
    plain, rows = copy.deepcopy(model), ids(4, 12)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = tuned(input_ids=rows).logits
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(input_ids=rows).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(rows).logits, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(merged(rows).logits, AutoModelForCausalLM.from_config(model.config)(rows).logits)


def test_trainer_on_packed_rows_in_bf16(model: HybridAttnForCausalLM, tmp_path: Path):
    """Packed rows of different lengths have the loss of separate rows, and training lowers it."""
    rows = [{"input_ids": list(range(2, 2 + n))} for n in (7, 12, 9, 1, 10)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate(rows)
    with torch.no_grad():
        packed = model(**batch).loss
        alone = [torch.tensor([row["input_ids"]]) for row in rows if len(row["input_ids"]) > 1]
        losses = [model(x, labels=x).loss * (x.shape[1] - 1) for x in alone]
        torch.testing.assert_close(packed, sum(losses) / sum(x.shape[1] - 1 for x in alone))
        positions = {name: x for name, x in batch.items() if name in ("input_ids", "position_ids")}
        with pytest.raises(ValueError, match="position_ids: expected ascending positions"):
            model(**positions)
    options = {"output_dir": tmp_path, "max_steps": 12, "logging_steps": 6, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(
        **options, use_cpu=True, bf16=True, learning_rate=1e-2, per_device_train_batch_size=4, save_strategy="no"
    )
    trainer = Trainer(model, args, train_dataset=rows * 8, data_collator=collate)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[1] < logged[0]


def test_parallelism_plans_name_modules_of_the_model(model: HybridAttnForCausalLM):
    """The plans of tensor, pipeline and FSDP2 parallelism name existing modules, and omit none."""
    modules = {re.sub(r"\d+", "*", name) for name, _ in model.model.named_modules()}
    config = model.config
    assert {"layers.*.mlp.up_proj"} <= set(config.base_model_tp_plan) <= modules
    assert set(config.base_model_pp_plan) == {name for name, _ in model.model.named_children()}
    assert set(getattr(config, "base_model_fsdp_plan", {})) <= modules  # transformers >= 5.23
    for plan in (model._tp_plan, model._pp_plan, model._fsdp_plan):
        assert "lm_head" in plan


@pytest.mark.slow
def test_checkpoints_open_without_an_import(
    run_python: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """trust_remote_code=True opens checkpoints in programs that do not import the library, also those they save."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_all(tmp_path / "first")
    for name, make in CONFIGS.items():  # loading one class imports the others, which would hide a missing entry
        family = type(make()).__name__.removesuffix("Config")
        classes = json.loads((tmp_path / "first" / name / "config.json").read_text())["auto_map"]
        assert {auto: path.partition(f".{family}")[2] for auto, path in classes.items()} == {
            "AutoConfig": "Config",
            "AutoModel": "Model",
            "AutoModelForCausalLM": "ForCausalLM",
            "AutoModelForSequenceClassification": "ForSequenceClassification",
        }
    for folder, after in pairwise(tmp_path / name for name in ("first", "again", "third")):
        run_python(f"""
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for name in {list(CONFIGS)}:
    folder = {str(folder)!r} + "/" + name
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    rows, expected = torch.load({str(tmp_path)!r} + "/first/" + name + "/expected")
    assert torch.equal(model(rows).logits, expected)
    model.save_pretrained({str(after)!r} + "/" + name)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(classifier).__name__ == type(model).__name__.replace("CausalLM", "SequenceClassification")
""")


def save_all(folder: Path) -> None:
    """Save a model of every configuration in a folder of its name, with token ids and their logits."""
    for name, make in CONFIGS.items():
        model, rows = AutoModelForCausalLM.from_config(make()).eval(), ids(2, 9)
        model.save_pretrained(folder / name)
        torch.save((rows, model(rows).logits), folder / name / "expected")


@pytest.mark.parametrize(
    ("mixer", "option"),
    [
        ("gla", {"conv_size": 3}),
        ("gla", {"gate_per": "head"}),
        ("full", {"sinks": True}),
        ("full", {"alibi": True, "rope_theta": None}),
    ],
)
def test_mixers_with_other_parameters_per_head_are_not_split(mixer: str, option: dict[str, Any]):
    """The plan splits a mixer only if none of its other parameters, constants or buffers have heads."""
    options = {"num_heads": 2}
    plan, without = (
        HybridAttnConfig(**SIZES, mixers=[mixer], mixer_options={mixer: {**options, **more}}).base_model_tp_plan
        for more in ({}, option)
    )
    assert "layers.*.mixer.o_proj" in plan
    assert not any("mixer" in name for name in without)
    assert "layers.*.mlp.down_proj" in without


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="spawns processes with gloo")
def test_tensor_parallel(run_python: Callable[..., str], tmp_path: Path):
    """Two processes, each with half of every split matrix, compute the logits of one process."""
    save_all(tmp_path)
    worker = tmp_path / "worker.py"
    worker.write_text(f"""
import torch, hybridattn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for name in {list(CONFIGS)}:
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name, tp_plan="auto")
    halves = [n for n, x in model.named_parameters() if isinstance(x, DTensor) and x.to_local().shape != x.shape]
    assert any("mlp.down_proj" in n for n in halves)
    assert any("mixer.o_proj" in n for n in halves) == ("layers.*.mixer.o_proj" in model.config.base_model_tp_plan)
    rows, expected = torch.load({str(tmp_path)!r} + "/" + name + "/expected")
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-4, atol=1e-5)
torch.distributed.destroy_process_group()
""")
    run_python(f"""
import subprocess, sys
command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", {str(worker)!r}]
done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
""")
    assert [name for name, make in CONFIGS.items() if "layers.*.mixer.o_proj" in make().base_model_tp_plan] == [
        "gla",
        "full and gla",
    ]
