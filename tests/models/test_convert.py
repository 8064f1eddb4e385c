"""Converted checkpoints, compared with the published formulas, which are evaluated on the original weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from hybridattn import HybridAttnForCausalLM, HybridAttnGLAConfig, HybridAttnGLAForCausalLM
from hybridattn.models.convert import convert

VOCAB, D, INNER, HEADS, FEATURES, WINDOW = 40, 16, 24, 2, 4, 12
MIXERS = "based.models.mixers."
FIELDS: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": VOCAB - 3,  # padded to a multiple of 8 in the file
    "pad_vocab_size_multiple": 8,
    "n_embd": D,
    "n_head": HEADS,
    "n_layer": 4,
    "n_inner": INNER,
    "n_positions": 64,
    "mixer": {"_target_": MIXERS + "convolution.BaseConv", "expand_proj": 4, "kernel_sizes": [3], "use_bias": True},
    "alt_mixer": {
        "_target_": MIXERS + "linear_attention.LinearAttention",
        "feature_map": {"_target_": MIXERS + "linear_attention.TaylorExp", "input_dim": FEATURES},
        "feature_dim": FEATURES,
        "num_heads": HEADS,
    },
    "alt_mixer_2": {"_target_": MIXERS + "slide_attention.SlidingAttention", "window_size": WINDOW, "num_heads": HEADS},
    "alt_mixer_layers": [1],
    "alt_mixer_2_layers": [2],
    "rms_norm": True,
    "activation_function": "swiglu",
    "rotary_emb_fraction": 1,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "residual_in_fp32": True,
    "layer_norm_epsilon": 1e-5,
}


def based(prefix: str = "", conv: str = "conv") -> dict[str, Tensor]:
    """Random weights under the names of the released files."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embeddings.word_embeddings.weight": (VOCAB, D),
        "transformer.ln_f.weight": (D,),
    }
    for layer, kind in enumerate(("conv", "linear", "slide", "conv")):
        mixer: dict[str, tuple[int, ...]] = {
            "conv": {
                "in_proj.weight": (4 * D, D),
                "in_proj.bias": (4 * D,),
                f"{conv}.conv.weight": (2 * D, 1, 3),
                "out_proj.weight": (D, 2 * D),
                "out_proj.bias": (D,),
            },
            "linear": {
                "proj_q.weight": (HEADS * FEATURES, D),
                "proj_k.weight": (HEADS * FEATURES, D),
                "proj_v.weight": (D, D),
                "out_proj.weight": (D, D),
            },
            "slide": {"Wqkv.weight": (3 * D, D), "out_proj.weight": (D, D)},
        }[kind]
        shapes |= {f"transformer.layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"transformer.layers.{layer}.mlp.fc1.weight"] = (2 * INNER, D)
        shapes[f"transformer.layers.{layer}.mlp.fc2.weight"] = (D, INNER)
        shapes |= {f"transformer.layers.{layer}.norm{i}.weight": (D,) for i in (1, 2)}
    weights = {prefix + name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}transformer.embeddings.word_embeddings.weight"]
    return weights


def write(folder: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**FIELDS, **changes}))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Evaluate the published formulas (BASED, section 4), token by token in fp64, on the file's weights."""
    w = {name: x.double() for name, x in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{name}.weight"]

    def phi(x: Tensor) -> Tensor:
        pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2**0.5 * FEATURES**0.5)
        return torch.cat((torch.ones_like(x[..., :1]), x / FEATURES**0.25, pairs), -1)

    def rotated(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)

    def mix(x: Tensor, at: str, kind: str) -> Tensor:
        if kind == "conv":
            left, right = (x @ w[f"{at}in_proj.weight"].T + w[f"{at}in_proj.bias"]).chunk(2, -1)
            padded = torch.cat((left.new_zeros(2, left.shape[1]), left))
            kernel = w[f"{at}conv.conv.weight"][:, 0]
            left = F.silu(sum(padded[i : i + len(x)] * kernel[:, i] for i in range(3)))
            return (left * right) @ w[f"{at}out_proj.weight"].T + w[f"{at}out_proj.bias"]
        if kind == "linear":
            q, k, v = ((x @ w[f"{at}proj_{n}.weight"].T).unflatten(-1, (HEADS, -1)) for n in "qkv")
            scores = torch.einsum("thf,shf->hts", phi(q), phi(k)).tril()
        else:
            q, k, v = (x @ w[f"{at}Wqkv.weight"].T).unflatten(-1, (3, HEADS, -1)).unbind(1)
            scores = torch.einsum("thd,shd->hts", rotated(q), rotated(k)) / q.shape[-1] ** 0.5
            distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
            scores = scores.exp() * ((distance >= 0) & (distance <= WINDOW // 2))
        o = torch.einsum("hts,shd->thd", scores / scores.sum(-1, keepdim=True), v).flatten(1)
        return o @ w[f"{at}out_proj.weight"].T

    rows = []
    for row in ids:
        x = w["transformer.embeddings.word_embeddings.weight"][row]
        for layer, kind in enumerate(("conv", "linear", "slide", "conv")):
            at = f"transformer.layers.{layer}."
            x = x + mix(norm(x, f"{at}norm1"), f"{at}mixer.", kind)
            value, gate = (norm(x, f"{at}norm2") @ w[f"{at}mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (value * F.silu(gate)) @ w[f"{at}mlp.fc2.weight"].T
        rows.append(norm(x, "transformer.ln_f") @ w["lm_head.weight"].T)
    return torch.stack(rows)


@torch.no_grad()
def test_based(tmp_path: Path):
    weights = based()
    source = write(tmp_path / "source", weights)
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target").double()
    assert type(model) is HybridAttnForCausalLM
    assert model.config.mixers == ["conv", "taylor", "window", "conv"]
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{}"
    ids = torch.randint(0, VOCAB, (2, 31))
    torch.testing.assert_close(model(ids).logits, logits(weights, ids), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_based_of_untied_embeddings(tmp_path: Path):
    weights = {**based(), "lm_head.weight": 0.3 * torch.randn(VOCAB, D)}
    model = convert(
        write(tmp_path / "source", weights, tie_word_embeddings=False, bos_token_id=7, eos_token_id=8),
        tmp_path / "target",
    ).double()
    assert (model.config.bos_token_id, model.config.eos_token_id) == (7, 8)
    ids = torch.randint(0, VOCAB, (2, 31))
    torch.testing.assert_close(model(ids).logits, logits(weights, ids), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_other_names_and_sharded_files_are_read(tmp_path: Path):
    """Names with a prefix, metrics, frequencies, another name of the convolution, and sharded files are read."""
    weights = based("model.", "conv1")
    expected = convert(write(tmp_path / "one", weights), tmp_path / "first").state_dict()
    extra = {f"{kind}_metrics.num-tokens.count": torch.tensor(7) for kind in ("train", "val", "test")}
    extra["model.transformer.layers.2.mixer.rotary_emb.inv_freq"] = torch.ones(4)
    source = write(tmp_path / "two", {})
    (source / "pytorch_model.bin").unlink()
    files = {"a.safetensors": list(weights)[:9], "b.safetensors": list(weights)[9:]}
    for file, names in files.items():
        save_file({name: weights[name].clone() for name in names} | (extra if file[0] == "b" else {}), source / file)
    index = {name: file for file, names in files.items() for name in names}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for (one, x), (other, y) in zip(
        expected.items(), convert(source, tmp_path / "second").state_dict().items(), strict=True
    ):
        assert one == other
        assert torch.equal(x, y)


@torch.no_grad()
def test_gla(tmp_path: Path):
    """Compared with the family's own loading, with another vocabulary, tied embeddings and another dtype."""
    config = HybridAttnGLAConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        tie_word_embeddings=True,
        use_short_conv=True,
        clamp_min=-0.1,
        norm_eps=0.3,
        bos_token_id=3,
        eos_token_id=[4, 5],
        pad_token_id=6,
        attn={"layers": [0], "num_heads": 2},
    )
    theirs = HybridAttnGLAForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "target")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert type(ours) is HybridAttnForCausalLM
    assert ours.dtype == torch.bfloat16
    assert (ours.config.bos_token_id, ours.config.eos_token_id, ours.config.pad_token_id) == (3, [4, 5], 6)
    assert "model.layers.1.mixer.q_conv.weight" in load_file(tmp_path / "target" / "model.safetensors")
    ids = torch.randint(0, 40, (2, 21))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet", "kda"])
def test_delta_rules(model_type: str, tmp_path: Path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "norm_eps": 0.3}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    theirs.save_pretrained(tmp_path / "source")
    ours = convert(tmp_path / "source", tmp_path / "target")
    assert type(ours) is HybridAttnForCausalLM
    ids = torch.randint(0, 40, (2, 21))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_every_weight_is_accounted_for(tmp_path: Path):
    changes = {
        "unknown: model.layers.1.mixer.surplus.weight; missing: none": {
            "transformer.layers.1.mixer.surplus.weight": torch.ones(1)
        },
        "unknown: none; missing: model.layers.2.mlp.down_proj.weight": {"transformer.layers.2.mlp.fc2.weight": None},
        r"layers\.1\.mixer\.q_proj\.weight \[3, 16\] for \[8, 16\]": {
            "transformer.layers.1.mixer.proj_q.weight": torch.ones(3, D)
        },
        "unknown: model.embeddings.position_embeddings.weight": {
            "transformer.embeddings.position_embeddings.weight": torch.ones(64, D)
        },
        "lm_head.weight: expected the embeddings": {"lm_head.weight": torch.ones(VOCAB, D)},
    }
    for number, (named, change) in enumerate(changes.items()):
        weights = {name: x for name, x in {**based(), **change}.items() if x is not None}
        with pytest.raises(ValueError, match=named):
            convert(write(tmp_path / f"source{number}", weights), tmp_path / "target")
        assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction: expected 0 or 1, got 0.5"),
        ({"activation_function": "gelu_new"}, "activation_function: expected 'swiglu'"),
        ({"rms_norm": False}, "rms_norm: expected True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected False"),
        ({"alt_mixer": {"_target_": "x.Hyena"}}, "alt_mixer: expected BaseConv, LinearAttention or SlidingAttention"),
        (
            {"alt_mixer": {"_target_": "x.LinearAttention", "feature_map": {"_target_": "x.Hedgehog"}}},
            "alt_mixer: expected the feature map TaylorExp with input_dim alone, got .*Hedgehog",
        ),
        (
            {"alt_mixer": {**FIELDS["alt_mixer"], "feature_map": {"_target_": "x.TaylorExp", "temp": 2}}},
            "alt_mixer: expected the feature map TaylorExp with input_dim alone",
        ),
        ({"alt_mixer": {**FIELDS["alt_mixer"], "decay": 1}}, r"alt_mixer: expected options .*, got \['decay'\]"),
        (
            {"mixer": {**FIELDS["mixer"], "kernel_sizes": [3, 5]}},
            "mixer: expected one size in kernel_sizes",
        ),
        ({"alt_mixer_layers": [1, 4]}, r"alt_mixer_layers: expected layers from 0 to 3, got \[4\]"),
        ({"alt_mixer": {"target": "x.LinearAttention"}}, "_target_: expected it in alt_mixer of a BASED model"),
        ({"alt_mixer": {"_target_": "x.LinearAttention"}}, "feature_map: expected it in alt_mixer"),
        ({"alt_mixer_2": {"_target_": "x.SlidingAttention"}}, "window_size: expected it in alt_mixer_2"),
        ({"mixer": None, "alt_mixer": None, "model_type": "gpt2"}, "transformer.embeddings|unknown"),
    ],
)
def test_configurations_that_ask_for_something_else(changes: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(ValueError, match=named):
        convert(write(tmp_path / "source", based(), **changes), tmp_path / "target")


def test_folders(tmp_path: Path):
    with pytest.raises(ValueError, match=r"source: expected a folder with config\.json"):
        convert(tmp_path, tmp_path / "target")
    source = write(tmp_path / "source", based())
    with pytest.raises(ValueError, match="target: expected a new or empty folder"):
        convert(source, source)
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"source: expected model\.safetensors or pytorch_model\.bin"):
        convert(source, tmp_path / "target")
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"expected model_type in .* or the mixers of BASED"):
        convert(source, tmp_path / "target")


def test_configurations_that_lack_a_size(tmp_path: Path):
    """Configurations without a size, or without a field whose default would give another model, are refused."""
    for name in ("activation_function", "rms_norm", "mlp_fc1_bias", "mlp_fc2_bias", "qkv_proj_bias", "out_proj_bias"):
        source = write(tmp_path / name, based())
        (source / "config.json").write_text(json.dumps({key: x for key, x in FIELDS.items() if key != name}))
        with pytest.raises(ValueError, match=f"{name}: expected .* in a BASED model"):
            convert(source, tmp_path / "target")
    for name in ("n_embd", "n_head", "n_layer"):
        source = write(tmp_path / name, based())
        (source / "config.json").write_text(json.dumps({key: x for key, x in FIELDS.items() if key != name}))
        with pytest.raises(ValueError, match=f"{name}: expected it in config.json of a BASED model"):
            convert(source, tmp_path / "target")


def test_files_of_gla_that_do_not_fit(tmp_path: Path):
    """Weights of another shape are named; damaged weights and configurations raise a ValueError."""
    config = HybridAttnGLAConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_heads=2)
    source, target = tmp_path / "source", tmp_path / "target"
    HybridAttnGLAForCausalLM(config).save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert(source, tmp_path / "good")
    assert (tmp_path / "good" / "chat_template.jinja").read_text() == "{{ messages }}"
    file = source / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.attn.q_proj.weight": torch.ones(3, 16)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.q_proj\.weight \[3, 16\] for \[8, 16\]"):
        convert(source, target)
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="source: expected weights in"):
        convert(source, target)
    file.unlink()
    with pytest.raises(ValueError, match="source: expected weights in"):
        convert(source, target)
    for text, named in (("{", "expected JSON"), ("[]", "expected a mapping")):
        (source / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"source: {named} in .*config.json"):
            convert(source, target)
    assert not target.exists()


def test_pickles(tmp_path: Path):
    """Both pickle formats are read, the older without memory mapping; other files are refused."""
    weights = based()
    source = write(tmp_path / "source", weights)
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    model = convert(source, tmp_path / "target")
    assert torch.equal(model.model.norm.weight, weights["transformer.ln_f.weight"])
    (source / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="source: expected weights in"):
        convert(source, tmp_path / "other")


def test_layers_of_two_kinds_under_one_name(tmp_path: Path):
    """Two windows of different sizes cannot be told apart by the mixer's name."""
    first = FIELDS["alt_mixer_2"]
    with pytest.raises(ValueError, match="expected one kind of window layers, got two"):
        convert(
            write(tmp_path / "source", based(), alt_mixer={**first, "window_size": 2 * WINDOW}), tmp_path / "target"
        )
