"""GLA in the format of flash-linear-attention: each library opens the other's checkpoints."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybridattn import HybridAttnGLAConfig, HybridAttnGLAForCausalLM

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "clamped": {"clamp_min": -0.01},
    "short convolutions": {"use_short_conv": True, "conv_size": 3},
    "norms and MLP": {"norm_eps": 0.5, "hidden_ratio": 48},
    "not fused": {"fuse_norm": False, "fuse_swiglu": False},
    "all": {"tie_word_embeddings": True, "clamp_min": -0.01, "use_short_conv": True, "expand_k": 1.0, "expand_v": 2.0},
}
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return checkpoints that flash-linear-attention wrote in a process without this library."""
    if find_spec("fla") is None:  # importing it here would give it model type gla
        pytest.skip("flash-linear-attention is not installed")
    folder = tmp_path_factory.mktemp("fla")
    run_python(f"""
import torch
from fla.models.gla import GLAConfig, GLAForCausalLM
torch.manual_seed(0)
for name, options in {VARIANTS}.items():
    model = GLAForCausalLM(GLAConfig(**{SIZES}, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained({str(folder)!r} + "/" + name)
""")
    return folder


def logits(weights: dict[str, Tensor], options: dict, ids: Tensor) -> Tensor:
    """Compute the published formulas (section 4.4 and appendix) token by token in fp64, from the file's names."""
    w = {name: x.double() for name, x in weights.items()}
    heads, embed = SIZES["num_heads"], w["model.embeddings.weight"]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + options.get("norm_eps", 1e-6)).rsqrt() * weight

    def convolved(x: Tensor, name: str) -> Tensor:
        kernel = w.get(f"{name}_conv1d.weight")
        if kernel is None:
            return x
        taps = kernel.shape[-1]
        padded = torch.cat((x.new_zeros(taps - 1, x.shape[1]), x))
        return F.silu(sum(padded[i : i + len(x)] * kernel[:, 0, i] for i in range(taps)))

    rows = []
    for row in ids:
        x = embed[row]
        for layer in range(SIZES["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            h = norm(x, w[f"{at}attn_norm.weight"])
            q, k, v = (
                convolved(h @ w[f"{at}attn.{n}_proj.weight"].T, f"{at}attn.{n}").unflatten(-1, (heads, -1))
                for n in "qkv"
            )
            gate = h @ w[f"{at}attn.gk_proj.0.weight"].T @ w[f"{at}attn.gk_proj.1.weight"].T
            gate = F.logsigmoid(gate + w[f"{at}attn.gk_proj.1.bias"]) / 16
            gate = gate.clamp(min=options.get("clamp_min", -torch.inf)).unflatten(-1, (heads, -1))
            state, outputs = x.new_zeros(heads, q.shape[-1], v.shape[-1]), []
            for t in range(len(row)):
                state = gate[t].exp()[..., None] * state + k[t][..., None] * v[t][:, None]
                outputs.append(torch.einsum("hk,hkv->hv", q[t] * q.shape[-1] ** -0.5, state))
            scale = w.get(f"{at}attn.g_norm_swish_gate.weight", w.get(f"{at}attn.g_norm.weight"))
            o = norm(torch.stack(outputs), scale).flatten(1) * F.silu(h @ w[f"{at}attn.g_proj.weight"].T)
            x = x + o @ w[f"{at}attn.o_proj.weight"].T
            h = norm(x, w[f"{at}mlp_norm.weight"])
            h = F.silu(h @ w[f"{at}mlp.gate_proj.weight"].T) * (h @ w[f"{at}mlp.up_proj.weight"].T)
            x = x + h @ w[f"{at}mlp.down_proj.weight"].T
        rows.append(norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", embed).T)
    return torch.stack(rows)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_of_flash_linear_attention_open_unchanged(name: str, checkpoints: Path):
    from safetensors.torch import load_file

    model = HybridAttnGLAForCausalLM.from_pretrained(checkpoints / name).double()
    ids = torch.randint(0, 40, (2, 37))
    expected = logits(load_file(checkpoints / name / "model.safetensors"), VARIANTS[name], ids)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 20:], past_key_values=cache).logits, expected[:, 20:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("imports", ["import hybridattn, fla.models", "import fla.models, hybridattn"])
def test_both_libraries(imports: str, checkpoints: Path, run_python: Callable[..., str], tmp_path: Path):
    """With imports in either order, AutoModel uses its classes for type gla, and each opens the other's checkpoints."""
    run_python(f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {imports}
    from transformers import AutoConfig, AutoModelForCausalLM
    import fla.models
    AutoConfig.for_model("gla")
ours = [str(w.message) for w in caught if "flash-linear-attention is imported" in str(w.message)]
assert len(ours) == 1, ours
import torch
from fla.models.gla import GLAForCausalLM
from hybridattn import HybridAttnGLAForCausalLM
for name in {list(VARIANTS)}:
    theirs = AutoModelForCausalLM.from_pretrained({str(checkpoints)!r} + "/" + name)
    assert type(theirs) is GLAForCausalLM
    folder = {str(tmp_path)!r} + "/" + name
    HybridAttnGLAForCausalLM.from_pretrained({str(checkpoints)!r} + "/" + name).save_pretrained(folder)
    back, report = GLAForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    for (one, x), (other, y) in zip(theirs.state_dict().items(), back.state_dict().items(), strict=True):
        assert one == other and torch.equal(x, y), (one, other)
""")


@pytest.mark.slow
def test_checkpoints_open_without_flash_linear_attention(checkpoints: Path, run_python: Callable[..., str]):
    run_python(
        f"""
import hybridattn
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoints / "plain")!r})
assert type(model).__name__ == "HybridAttnGLAForCausalLM"
""",
        blocked=("fla",),
    )


def test_softmax_layers():
    attn: dict = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 6}
    for theta, changes in ((10000.0, {}), (500.0, {"rope_theta": 500.0})):
        config = HybridAttnGLAConfig(**SIZES, attn={**attn, **changes})
        assert config.mixers == ["gla", "window"]
        mixer = HybridAttnGLAForCausalLM(config).model.layers[1].mixer
        assert (mixer.num_heads, mixer.num_key_value_heads, mixer.window, mixer.rope_theta) == (4, 2, 6, theta)


def test_softmax_layers_of_two_kinds():
    window = {"layers": [0], "num_heads": 2, "window_size": 4}
    config = HybridAttnGLAConfig(**{**SIZES, "num_hidden_layers": 3}, attn=[window, {"layers": [2], "num_heads": 4}])
    assert config.mixers == ["window", "gla", "full"]
    assert config.mixer_options["full"]["num_heads"] == 4
    config = HybridAttnGLAConfig(**SIZES, attn=[window, {**window, "layers": [1], "window_size": 5}])
    assert [layer.mixer.window for layer in HybridAttnGLAForCausalLM(config).model.layers] == [4, 5]


def test_a_changed_configuration_is_not_saved_as_another_model(tmp_path: Path):
    for name, value in {"norm_eps": 1e-2, "clamp_min": -0.1, "mixers": ["full", "gla"], "num_hidden_layers": 3}.items():
        config = HybridAttnGLAConfig(**SIZES)
        setattr(config, name, value)
        with pytest.raises(ValueError, match="which follows from the fields of a GLA model"):
            config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"feature_map": "relu"}, "feature_map: expected None"),
        ({"use_gv": True}, "use_gv: expected False"),
        ({"use_output_gate": False}, "use_output_gate: expected True"),
        ({"hidden_act": "powlu"}, "hidden_act: expected 'swish'"),
        ({"attnres_block_size": 2}, "attnres_block_size: expected None"),
        ({"num_heads": 0}, "num_heads: expected a positive integer, got 0"),
        ({"mixers": "1 full : 1 gla"}, "mixers: expected None in a GLA model, got '1 full : 1 gla'"),
        ({"mixer_options": {"gla": {"gate_rank": 4}}}, "mixer_options: expected {} in a GLA model"),
        ({"input_conv_size": 4}, "input_conv_size: expected None in a GLA model"),
        ({"mlp": "none"}, "mlp: expected 'swiglu' in a GLA model"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: expected 1e-06 in a GLA model"),
        ({"num_kv_heads": 1}, "num_kv_heads: expected None or num_heads 2"),
        ({"expand_k": 0.3}, "expand_k: expected a dimension divisible by 2 heads"),
        ({"attn": {"layers": [0], "num_heads": 2, "qkv_bias": True}}, "attn: expected layers, num_heads"),
        ({"attn": {"layers": 1, "num_heads": 2}}, "attn: expected layers from 0 to 1, got 1"),
        ({"attn": [{"layers": [0], "num_heads": 2}] * 2}, "attn: expected each layer once, got layer 0 again"),
        ({"attn": {"layers": [0]}}, "attn: expected layers, num_heads"),
        ({"attn": {"layers": [2], "num_heads": 2}}, "attn: expected layers from 0 to 1"),
    ],
)
def test_unsupported_fields_are_refused(options: dict, named: str):
    with pytest.raises(ValueError, match=named):
        HybridAttnGLAConfig(**{**SIZES, **options})
