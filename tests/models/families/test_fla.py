"""Models in the format of flash-linear-attention: each library opens the other's checkpoints."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hybridattn
from hybridattn import (
    HybridAttnConfig,
    HybridAttnDeltaNetConfig,
    HybridAttnForCausalLM,
    HybridAttnGatedDeltaNetConfig,
    HybridAttnGLAConfig,
    HybridAttnGLAForCausalLM,
    HybridAttnKDAConfig,
)

ATTN = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 6}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "GLA": {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "clamped": {"clamp_min": -0.01},
        "short convolutions": {"use_short_conv": True, "conv_size": 3},
        "norms and MLP": {"norm_eps": 0.5, "hidden_ratio": 48},
        "not fused": {"fuse_norm": False, "fuse_swiglu": False},
        "all": {
            "tie_word_embeddings": True,
            "clamp_min": -0.01,
            "use_short_conv": True,
            "expand_k": 1.0,
            "expand_v": 2.0,
        },
    },
    "DeltaNet": {
        "plain": {},
        "gate": {"use_gate": True, "allow_neg_eigval": True, "conv_size": 3, "expand_k": 0.5, "expand_v": 2},
        "no convolutions": {"use_short_conv": False, "norm_eps": 0.5, "tie_word_embeddings": True},
        "relu and attention": {"qk_activation": "relu", "attn": ATTN},
        "elu": {"qk_activation": "elu", "use_short_conv": False, "use_output_norm": False},
        "identity": {"qk_activation": "identity"},
    },
    "GatedDeltaNet": {
        "plain": {"head_dim": 4},
        "grouped values": {"head_dim": 3, "num_v_heads": 4, "allow_neg_eigval": True, "expand_v": 1},
        "sigmoid gate": {"head_dim": 4, "output_gate_activation": "sigmoid", "use_short_conv": False},
        "no gate, attention": {"head_dim": 4, "use_gate": False, "attn": {**ATTN, "window_size": None}},
    },
    "KDA": {
        "plain": {"head_dim": 4},
        "grouped values": {"head_dim": 4, "num_v_heads": 4, "allow_neg_eigval": True, "expand_v": 2},
        "lower bound": {"head_dim": 4, "safe_gate": True, "lower_bound": -3.0, "use_short_conv": False},
        "attention": {"head_dim": 4, "attn": {**ATTN, "rope_theta": 500.0}, "norm_eps": 0.5},
    },
}
CASES = [(family, name) for family, variants in VARIANTS.items() for name in variants]
BUILD = "import fla.layers.attn; fla.layers.attn.flash_attn_func = object()"  # without flash-attn, which computes only
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return checkpoints that flash-linear-attention wrote in a process without this library."""
    if find_spec("fla") is None:  # importing it here would give it the model types
        pytest.skip("flash-linear-attention is not installed")
    folder = tmp_path_factory.mktemp("fla")
    run_python(f"""
import torch
import fla.models
{BUILD}
torch.manual_seed(0)
for family, variants in {VARIANTS}.items():
    for name, options in variants.items():
        config = getattr(fla.models, family + "Config")(**{SIZES}, **options)
        model = getattr(fla.models, family + "ForCausalLM")(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained({str(folder)!r} + "/" + family + "/" + name)
""")
    return folder


def ours(family: str) -> type[HybridAttnForCausalLM]:
    return getattr(hybridattn, f"HybridAttn{family}ForCausalLM")


class Published:
    """The published formulas, token by token in fp64, of the weights of one file under the file's names."""

    def __init__(self, family: str, options: dict[str, Any], weights: dict[str, Tensor]):
        self.family, self.options = family, options
        self.w = {name: x.double() for name, x in weights.items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.options.get("norm_eps", 1e-6)
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self.w[f"{name}.weight"]

    def linear(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)
        return x

    def projected(self, h: Tensor, at: str, name: str) -> Tensor:
        """Return q, k or v with its convolution and activation, [T,heads,D]."""
        x, kernel = self.linear(h, f"{at}{name}_proj"), self.w.get(f"{at}{name}_conv1d.weight")
        if kernel is not None:
            padded = torch.cat((x.new_zeros(kernel.shape[-1] - 1, x.shape[1]), x))
            x = sum((padded[i : i + len(x)] * kernel[:, 0, i] for i in range(kernel.shape[-1])), torch.zeros(()))
        activation = "silu" if name == "v" else self.options.get("qk_activation", "silu")
        if self.family == "GLA" and kernel is None:
            activation = "identity"
        x = {"silu": F.silu, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}[activation](x)
        values = self.options.get("num_v_heads") or SIZES["num_heads"]
        return x.unflatten(-1, (values if name == "v" else SIZES["num_heads"], -1))

    def log_decay(self, h: Tensor, at: str) -> Tensor:
        """Return the log-decay [T,H,K], or [T,H,1] with one number per head."""
        if self.family == "GLA":  # section 4.4
            g = F.logsigmoid(self.linear(h, f"{at}gk_proj.0", f"{at}gk_proj.1")) / 16
            return g.clamp(min=self.options.get("clamp_min", -torch.inf)).unflatten(-1, (SIZES["num_heads"], -1))
        if self.family == "DeltaNet":
            return h.new_zeros(len(h), SIZES["num_heads"], 1)
        rate, bias = self.w[f"{at}A_log"].exp()[:, None], self.w[f"{at}dt_bias"]
        if self.family == "GatedDeltaNet":
            return -rate * F.softplus(self.linear(h, f"{at}a_proj") + bias)[..., None]
        x = (self.linear(h, f"{at}f_proj.0", f"{at}f_proj.1") + bias).unflatten(-1, (len(rate), -1))
        bound = self.options.get("lower_bound")
        return -rate * F.softplus(x) if bound is None else bound * (rate * x).sigmoid()

    def recurrent(self, h: Tensor, at: str) -> Tensor:
        q, k, v = (self.projected(h, at, name) for name in "qkv")
        decay, beta = self.log_decay(h, at).exp(), None
        if self.family != "GLA":
            q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
            beta = self.linear(h, f"{at}b_proj").sigmoid() * (2 if self.options.get("allow_neg_eigval") else 1)
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
        state, outputs = h.new_zeros(v.shape[1], q.shape[-1], v.shape[-1]), []
        for t in range(len(h)):
            state, new = decay[t][..., None] * state, v[t]
            if beta is not None:
                new = beta[t][:, None] * (new - torch.einsum("hk,hkv->hv", k[t], state))
            state = state + k[t][..., None] * new[:, None]
            outputs.append(torch.einsum("hk,hkv->hv", q[t] * q.shape[-1] ** -0.5, state))
        gla = "g_norm" if f"{at}g_norm.weight" in self.w else "g_norm_swish_gate"
        o = self.norm(torch.stack(outputs), f"{at}{gla if self.family == 'GLA' else 'o_norm'}").flatten(1)
        if self.family == "KDA":
            o = o * self.linear(h, f"{at}g_proj.0", f"{at}g_proj.1").sigmoid()
        elif f"{at}g_proj.weight" in self.w:
            sigmoid = self.options.get("output_gate_activation") == "sigmoid"
            o = o * (torch.sigmoid if sigmoid else F.silu)(self.linear(h, f"{at}g_proj"))
        return self.linear(o, f"{at}o_proj")

    def softmax(self, h: Tensor, at: str) -> Tensor:
        attn = self.options["attn"]
        q, k, v = (self.linear(h, f"{at}{name}_proj").unflatten(-1, (-1, 16 // attn["num_heads"])) for name in "qkv")
        half = q.shape[-1] // 2
        angles = torch.arange(len(h))[:, None] * attn.get("rope_theta", 10000.0) ** (
            -torch.arange(half).double() / half
        )
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k.conj()).real / v.shape[-1] ** 0.5
        distance = torch.arange(len(h))[:, None] - torch.arange(len(h))
        scores = scores.masked_fill((distance < 0) | (distance >= (attn["window_size"] or len(h))), -torch.inf)
        return self.linear(torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1), f"{at}o_proj")

    def logits(self, row: Tensor) -> Tensor:
        """Return the logits [T,vocab_size] of the token ids [T]."""
        x = self.w["model.embeddings.weight"][row]
        for layer in range(SIZES["num_hidden_layers"]):
            at, attn = f"model.layers.{layer}.", self.options.get("attn")
            mix = self.softmax if attn and layer in attn["layers"] else self.recurrent
            x = x + mix(self.norm(x, f"{at}attn_norm"), f"{at}attn.")
            h = self.norm(x, f"{at}mlp_norm")
            h = F.silu(self.linear(h, f"{at}mlp.gate_proj")) * self.linear(h, f"{at}mlp.up_proj")
            x = x + self.linear(h, f"{at}mlp.down_proj")
        return self.norm(x, "model.norm") @ self.w.get("lm_head.weight", self.w["model.embeddings.weight"]).T


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_checkpoints_of_flash_linear_attention_open_unchanged(family: str, name: str, checkpoints: Path):
    from safetensors.torch import load_file

    folder = checkpoints / family / name
    loaded: Any = ours(family).from_pretrained(folder, output_loading_info=True)
    model, report = loaded[0].double(), loaded[1]
    assert not any(report.values()), report
    ids = torch.randint(0, 40, (2, 25))
    published = Published(family, VARIANTS[family][name], load_file(folder / "model.safetensors"))
    expected = torch.stack([published.logits(row) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    parts = [model(part, past_key_values=cache).logits for part in (ids[:, 20:22], ids[:, 22:23], ids[:, 23:])]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:, 20:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("imports", "cases"),
    [
        ("import hybridattn, fla.models", CASES),
        ("import fla.models, hybridattn", [(family, "plain") for family in VARIANTS]),
    ],
)
def test_both_libraries(
    imports: str, cases: list[tuple[str, str]], checkpoints: Path, run_python: Callable[..., str], tmp_path: Path
):
    """With imports in either order, AutoModel uses its classes for the types; each opens the other's checkpoints."""
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
assert all(repr(name) in ours[0] for name in ("gla", "delta_net", "gated_deltanet", "kda"))
import torch
{BUILD}
for family, name in {cases}:
    folder, again = ({str(checkpoints)!r} + f"/{{family}}/{{name}}", {str(tmp_path)!r} + f"/{{family}}/{{name}}")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is getattr(fla.models, family + "ForCausalLM")
    getattr(hybridattn, "HybridAttn" + family + "ForCausalLM").from_pretrained(folder).save_pretrained(again)
    back, report = type(theirs).from_pretrained(again, output_loading_info=True)
    assert not any(report.values()), report
    for (one, x), (other, y) in zip(theirs.state_dict().items(), back.state_dict().items(), strict=True):
        assert one == other and torch.equal(x, y), (one, other)
    before, after = theirs.config.to_dict(), back.config.to_dict()
    changed = {{key for key in before if before[key] != after[key]}}
    assert changed <= {{"architectures", "intermediate_size", "_name_or_path"}}, changed
""")


@pytest.mark.slow
def test_checkpoints_open_without_flash_linear_attention(checkpoints: Path, run_python: Callable[..., str]):
    run_python(
        f"""
import hybridattn
from transformers import AutoModelForCausalLM
for family in {list(VARIANTS)}:
    model = AutoModelForCausalLM.from_pretrained({str(checkpoints)!r} + f"/{{family}}/plain")
    assert type(model) is getattr(hybridattn, f"HybridAttn{{family}}ForCausalLM")
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


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        (HybridAttnDeltaNetConfig, {"use_beta": False}, "use_beta: expected True in a DeltaNet model, got False"),
        (HybridAttnDeltaNetConfig, {"qk_norm": "sum"}, "qk_norm: expected 'l2' in a DeltaNet model"),
        (HybridAttnDeltaNetConfig, {"qk_activation": "gelu"}, "qk_activation: expected one of"),
        (HybridAttnDeltaNetConfig, {"use_gk": True}, "use_gk: expected a field of HybridAttnDeltaNetConfig"),
        (HybridAttnGatedDeltaNetConfig, {"hidden_act": "powlu"}, "hidden_act: expected 'swish' in a GatedDeltaNet"),
        (HybridAttnGatedDeltaNetConfig, {"output_gate_activation": "relu"}, "output_gate_activation: expected 'swish'"),
        (HybridAttnGatedDeltaNetConfig, {"num_v_heads": 3}, "num_v_heads: expected a multiple of num_heads 2, got 3"),
        (HybridAttnGatedDeltaNetConfig, {"expand_v": 0.3}, "expand_v: expected a dimension divisible by 2 heads"),
        (HybridAttnKDAConfig, {"safe_gate": True}, "lower_bound: expected -5 to 0 with safe_gate, got None"),
        (HybridAttnKDAConfig, {"lower_bound": 1}, "lower_bound: expected a negative number or None"),
        (HybridAttnKDAConfig, {"mlp": "none"}, "mlp: expected 'swiglu' in a KDA model"),
    ],
)
def test_unsupported_fields_of_delta_rules_are_refused(family: type[HybridAttnConfig], options: dict, named: str):
    with pytest.raises(ValueError, match=named):
        family(**{**SIZES, **options})
