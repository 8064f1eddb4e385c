"""Every mixer of MIXERS without a decoder: cached and packed calls, causality, gradients, cache sizes, bad options."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hybridattn.layers import (
    BaseConv,
    Cache,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LightningAttention,
    LinearAttention,
    Mamba2,
    PrefixLinearAttention,
    Retention,
    ShortConvolution,
    SoftmaxAttention,
    TaylorLinearAttention,
    TokenMixer,
)
from hybridattn.layers.decays import HeadDecay
from hybridattn.layers.kv_cache import GROWTH

D, TOKENS = 12, 41
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


class Prefixed(PrefixLinearAttention):
    """A layer whose prefix is the first token of every sequence.

    With a longer prefix, causality and equality of splits hold only after it (see test_prefix_linear_attention.py).
    """

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor:
        if not cache:
            batch, tokens = hidden_states.shape[:2]
            lengths = torch.full((batch,), tokens) if cu_seqlens is None else cu_seqlens.diff()
            prefix_lengths = lengths.clamp(max=1)
        return super().forward(hidden_states, cu_seqlens, position_ids, cache, prefix_lengths)


MIXERS: dict[str, Callable[[], TokenMixer]] = {
    "gla": lambda: GatedLinearAttention(D, num_heads=2, gate_bias_range=(-40.0, 4.0)),
    "gla, short convolutions": lambda: GatedLinearAttention(D, num_heads=2, conv_size=3, gate_min=-0.02),
    "gla, rotary positions": lambda: GatedLinearAttention(D, num_heads=3, key_dim=4, rope_theta=100.0),
    "gla, a gate per head": lambda: GatedLinearAttention(D, num_heads=2, gate_per="head"),
    "delta": lambda: DeltaNet(D, num_heads=2, conv_size=None, allow_neg_eigval=True),
    "gated delta, grouped values": lambda: GatedDeltaNet(D, num_heads=2, key_dim=4, num_value_heads=4, conv_size=3),
    "kda": lambda: KimiDeltaAttention(D, num_heads=2, key_dim=4, value_dim=3),
    "kda, lower bound, grouped values": lambda: KimiDeltaAttention(
        D, num_heads=2, key_dim=4, num_value_heads=4, lower_bound=-5.0
    ),
    "mamba2": lambda: Mamba2(D, head_dim=6, state_size=5, num_groups=2, dt_limit=(0.01, 0.5)),
    "linear": lambda: LinearAttention(D, num_heads=2, key_dim=4),
    "linear, not normalized": lambda: LinearAttention(D, num_heads=3, feature_map="identity", normalize=False),
    "taylor": lambda: TaylorLinearAttention(D, num_heads=2, key_dim=4),
    "prefix of 1": lambda: Prefixed(D, num_heads=2, key_dim=4),
    "prefix of 1, tied": lambda: Prefixed(D, num_heads=2, key_dim=4, tie_prefix=True),
    "retention": lambda: Retention(D, num_heads=2),
    "retention, no positions": lambda: Retention(D, num_heads=2, rope_theta=None),
    "lightning": lambda: LightningAttention(D, num_heads=2),
    "lightning, linear values": lambda: LightningAttention(
        D, num_heads=2, slopes=[0.5, 0.0], activate_values=False, rope_theta=100.0
    ),
    "full": lambda: SoftmaxAttention(D, num_heads=3),
    "full, grouped heads": lambda: SoftmaxAttention(D, num_heads=6, num_key_value_heads=3),
    "full, no positions": lambda: SoftmaxAttention(D, num_heads=2, rope_theta=None),
    "full, alibi": lambda: SoftmaxAttention(D, num_heads=4, num_key_value_heads=2, rope_theta=None, alibi=True),
    "full, sinks": lambda: SoftmaxAttention(D, num_heads=2, sinks=True),
    "full, softcap": lambda: SoftmaxAttention(D, num_heads=2, softcap=0.5),
    "full, qk norm": lambda: SoftmaxAttention(D, num_heads=2, qk_norm=True),
    "full, biases": lambda: SoftmaxAttention(D, num_heads=2, bias=True),
    "full, yarn": lambda: SoftmaxAttention(D, num_heads=2, rope_scaling=YARN),
    "window 6, all options": lambda: SoftmaxAttention(
        D, num_heads=2, window=6, rope_scaling=YARN, alibi=True, sinks=True, softcap=2.0, qk_norm=True
    ),
    "window 1": lambda: SoftmaxAttention(D, num_heads=2, window=1),
    "window 6": lambda: SoftmaxAttention(D, num_heads=2, window=6),
    "window 100": lambda: SoftmaxAttention(D, num_heads=2, window=100),
    "short convolution": lambda: ShortConvolution(D, 4, activation="silu", bias=True),
    "short convolution of 1": lambda: ShortConvolution(D, 1),
    "conv": lambda: BaseConv(D),
    "conv, not expanded": lambda: BaseConv(D, expand=0),
}
# Mixers whose code another row covers, with other sizes or more options. Tracing a mixer takes a second.
TRACED_BY_OTHERS = {
    "retention, no positions",
    "lightning, linear values",
    "full, grouped heads",
    "full, no positions",
    "full, alibi",
    "full, sinks",
    "full, softcap",
    "full, qk norm",
    "full, biases",
    "full, yarn",
    "window 1",
    "window 6",
    "window 100",
    "short convolution of 1",
    "conv, not expanded",
}
# Mixers whose packed form tests/models/decoder/test_compile.py compiles.
TRACED_BY_THE_DECODER = {
    "gla",
    "gla, short convolutions",
    "linear",
    "taylor",
    "prefix of 1",
    "retention",
    "lightning",
    "full",
    "conv",
}
TRACED = [name for name in MIXERS if name not in TRACED_BY_OTHERS]
CONSTANT = [name for name in MIXERS if "full" not in name]


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> TokenMixer:
    made = MIXERS[request.param]().double()
    with torch.no_grad():  # with initial values of zero, a mixer that omits them would pass
        for name, parameter in made.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # states are fp32


@pytest.mark.parametrize("cuts", [[], [1], [20], [7, 8, 30], list(range(1, TOKENS))])
def test_any_split_with_a_cache_equals_one_pass(mixer: TokenMixer, cuts: list[int]):
    x = torch.randn(2, TOKENS, D).double()
    expected, cache = mixer(x), Cache()
    with torch.no_grad():
        parts = [mixer(x[:, a:b], cache=cache) for a, b in pairwise([0, *cuts, TOKENS])]
    close(torch.cat(parts, 1), expected.detach())


@pytest.mark.parametrize("lengths", [[41], [3, 0, 20, 1, 8], [0, 0]])
def test_packed_equals_one_by_one(mixer: TokenMixer, lengths: list[int]):
    x = torch.randn(1, sum(lengths) + 2, D).double().requires_grad_()  # the last two belong to no sequence
    ends = torch.tensor([0, *lengths]).cumsum(0)
    o = mixer(x, cu_seqlens=ends)
    parts = [mixer(part) for part in x[0, : ends[-1]].split(lengths) if part.numel() for part in [part[None]]]
    expected = torch.cat(parts, 1) if parts else o[:, :0]
    close(o[:, : ends[-1]], expected)
    (grad,) = torch.autograd.grad(o[:, : ends[-1]].square().sum(), x, allow_unused=True)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x, allow_unused=True) if parts else (None,)
    if expected_grad is not None:
        close(grad, expected_grad)


def test_packed_steps_after_packed_prompts(mixer: TokenMixer):
    """Packed prompts, then packed chunks, then steps of all rows give the outputs of each sequence alone."""
    lengths, more = [3, 0, 20, 1], [2, 9, 0, 1]
    rows = [torch.randn(1, n + m + 4, D).double() for n, m in zip(lengths, more, strict=True)]
    cache = Cache()
    with torch.no_grad():
        prompt = torch.cat([x[:, :n] for x, n in zip(rows, lengths, strict=True)], 1)
        mixer(prompt, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), cache=cache)
        then = torch.cat([x[:, n : n + m] for x, n, m in zip(rows, lengths, more, strict=True)], 1)
        o = mixer(then, cu_seqlens=torch.tensor([0, *more]).cumsum(0), cache=cache)
        ends = [n + m for n, m in zip(lengths, more, strict=True)]
        steps = [
            mixer(torch.cat([x[:, e + i, None] for x, e in zip(rows, ends, strict=True)]), cache=cache)
            for i in range(4)
        ]
        for row, (x, n, e, part) in enumerate(zip(rows, lengths, ends, o[0].split(more), strict=True)):
            if isinstance(mixer, Prefixed) and n == 0:
                continue  # its prefix would have to be in the first call, which has no token of it
            expected = mixer(x)[0]
            close(part, expected[n:e])
            close(torch.cat([s[row] for s in steps]), expected[e:])


def test_causal(mixer: TokenMixer):
    x = torch.randn(2, TOKENS, D).double()
    changed = torch.cat((x[:, :20], x[:, 20:].flip(1)), 1)
    a, b = mixer(x), mixer(changed)
    close(b[:, :20], a[:, :20])
    assert not torch.allclose(b[:, 20:], a[:, 20:])


def test_gradients(mixer: TokenMixer):
    x = torch.randn(1, 9, D).double().requires_grad_()
    parameters = [p for p in mixer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: mixer(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_has_the_shapes_of_cache_spec(mixer: TokenMixer, batch: int):
    mixer.float()
    with torch.no_grad():
        cache = Cache()
        mixer(torch.randn(batch, TOKENS, D), cache=cache)
    spec = mixer.cache_spec(batch, TOKENS, torch.float32)
    assert {name: (tuple(x.shape), x.dtype) for name, x in cache.items()} == spec
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in cache.values())


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_states_keep_their_size_and_address(name: str):
    mixer = MIXERS[name]()
    assert mixer.cache_spec(2, 10, torch.bfloat16) == mixer.cache_spec(2, 10**6, torch.bfloat16)
    cache = Cache()
    with torch.no_grad():
        mixer(torch.randn(2, 3, D), cache=cache)
        before = {name: (x.data_ptr(), x.nbytes) for name, x in cache.items()}
        for _ in range(12):
            mixer(torch.randn(2, 1, D), cache=cache)
    assert {name: (x.data_ptr(), x.nbytes) for name, x in cache.items()} == before


def test_a_full_cache_grows_in_steps():
    mixer, cache = SoftmaxAttention(D, num_heads=2), Cache()
    with torch.no_grad():
        mixer(torch.randn(1, 5, D), cache=cache)
        assert cache["keys"].shape[1] == 5
        mixer(torch.randn(1, 1, D), cache=cache)
        kept = cache["keys"].data_ptr()
        for _ in range(GROWTH - 6):
            mixer(torch.randn(1, 1, D), cache=cache)
        assert cache["keys"].shape[1] == GROWTH
        assert cache["keys"].data_ptr() == kept
        mixer(torch.randn(1, 1, D), cache=cache)
        assert cache["keys"].shape[1] == 2 * GROWTH


def test_gradients_flow_through_a_cache(mixer: TokenMixer):
    x = torch.randn(2, 10, D).double().requires_grad_()
    cache = Cache()
    o = torch.cat([mixer(part, cache=cache) for part in x.split([4, 1, 5], 1)], 1)
    (grad,) = torch.autograd.grad(o.square().sum(), x)
    (expected,) = torch.autograd.grad(mixer(x).square().sum(), x)
    close(grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "offsets"),
    [(name, None) for name in TRACED] + [(name, [0, 5, 5, 8]) for name in TRACED if name not in TRACED_BY_THE_DECODER],
    indirect=["mixer"],
)
def test_forward_and_backward_compile_without_a_graph_break(mixer: TokenMixer, offsets: list[int] | None):
    torch.compiler.reset()
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    x, results = torch.randn(1, 9, D).double().requires_grad_(), []
    for run in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        o = run(x, cu_seqlens=cu_seqlens)
        results.append((o.detach(), *torch.autograd.grad(o[:, :8].square().sum(), (x, *mixer.parameters()))))
    for eager, compiled in zip(*results, strict=True):
        close(compiled, eager)


def test_position_ids_set_the_rotary_positions():
    mixer, x = SoftmaxAttention(D, num_heads=2), torch.randn(1, 6, D)
    torch.testing.assert_close(mixer(x, position_ids=torch.arange(6)[None] + 50), mixer(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixer(x, position_ids=2 * torch.arange(6)[None]), mixer(x))


def test_gated_linear_attention_equals_the_published_formula():
    layer, x = (
        GatedLinearAttention(D, num_heads=2, gate_rank=3, gate_bias_range=(-2.0, 2.0)).double(),
        torch.randn(1, 7, D),
    )
    x = x.double()

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (2, -1))

    gate = x @ layer.gk_proj.down.weight.T @ layer.gk_proj.up.weight.T + layer.gk_proj.up.bias
    decay = heads(torch.sigmoid(gate) ** (1 / 16))
    q, k, v = (heads(x @ p.weight.T) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    state, outputs = torch.zeros(2, 3, 6).double(), []
    for t in range(7):
        state = decay[0, t][..., None] * state + k[0, t][..., None] * v[0, t][:, None]
        outputs.append((q[0, t][:, None] @ state)[:, 0] * 3**-0.5)
    o = torch.stack(outputs)[None]
    o = (o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(2)
    swish = x @ layer.g_proj.weight.T
    torch.testing.assert_close(layer(x), (o * swish * torch.sigmoid(swish)) @ layer.o_proj.weight.T)


@pytest.mark.parametrize("gate_per", ["channel", "head"])
def test_gate_min_limits_the_log_decay(gate_per: str):
    """The limit applies after the normaliser, and does not change greater log-decays."""
    free, least = (GatedLinearAttention(D, num_heads=2, gate_per=gate_per, gate_min=g) for g in (None, -0.03))
    least.load_state_dict(free.state_dict())
    x = 3 * torch.randn(2, 40, D)
    g = free.log_decay(x)
    assert g.min() < -0.03 < g.max()
    assert torch.equal(least.log_decay(x), g.clamp(min=-0.03))


def test_a_gate_per_head_equals_the_formula_of_mamba_2():
    layer, x = GatedLinearAttention(D, num_heads=2, key_dim=2, gate_per="head").double(), torch.randn(1, 9, D).double()
    gate = layer.gk_proj
    assert isinstance(gate, HeadDecay)
    a, dt = gate.A_log.exp(), torch.log(1 + gate.dt_bias.exp())
    assert ((a >= 1) & (a <= 16) & (dt >= 0.00099) & (dt <= 0.101)).all()
    state, outputs = torch.zeros(2, 2, 6).double(), []
    q, k, v = (p(x)[0].unflatten(-1, (2, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    for t in range(9):
        for h in range(2):
            step = torch.log(1 + torch.exp(x[0, t] @ gate.dt_proj.weight[h] + gate.dt_bias[h]))
            state[h] = torch.exp(-a[h] * step) * state[h] + k[t, h, :, None] * v[t, h]
            outputs.append(q[t, h] @ state[h] * 2**-0.5)
    o = layer.g_norm(torch.stack(outputs).view(1, 9, 2, 6)).flatten(2)
    torch.testing.assert_close(layer(x), layer.o_proj(o * torch.nn.functional.silu(layer.g_proj(x))))


def test_a_cache_of_another_batch_is_refused(mixer: TokenMixer):
    cache, mixer = Cache(), mixer.float()
    with torch.no_grad():
        mixer(torch.randn(2, 5, D), cache=cache)
        with pytest.raises(ValueError, match="expected"):
            mixer(torch.randn(3, 5, D), cache=cache)


def test_a_plain_dict_as_cache_is_refused(mixer: TokenMixer):
    with pytest.raises(ValueError, match=r"cache: expected a hybridattn.Cache or None, got dict"):
        mixer(torch.randn(2, 5, D).double(), cache={})


@pytest.mark.parametrize("offsets", [[0, 5, 3, 9], [0, 10]])
def test_bad_offsets_are_refused(mixer: TokenMixer, offsets: list[int]):
    with pytest.raises(ValueError, match=r"cu_seqlens.*: expected ascending offsets"):
        mixer(torch.randn(1, 9, D).double(), cu_seqlens=torch.tensor(offsets))
    with pytest.raises(ValueError, match=r"cu_seqlens.*: expected one packed row"):
        mixer(torch.randn(2, 9, D).double(), cu_seqlens=torch.tensor([0, 9]))


BAD = {
    "slopes by another name": (
        lambda: Retention(D, num_heads=2, slopes="xpos"),
        r"slopes: expected numbers or one of \['alibi', 'retnet', 'transnormer'\], got 'xpos'",
    ),
    "slopes of other heads": (
        lambda: LightningAttention(D, num_heads=2, slopes=[0.1]),
        r"slopes: expected 2 numbers of at least 0, one per head, got \[0.1\]",
    ),
    "growing slopes": (
        lambda: Retention(D, num_heads=2, slopes=[0.1, -0.1]),
        "slopes: expected 2 numbers of at least 0",
    ),
    "a layer too many": (
        lambda: LightningAttention(D, num_heads=2, layer_idx=3, num_layers=3),
        "layer_idx: expected 0 to 2, one of 3 layers, got 3",
    ),
    "odd rotary keys": (
        lambda: Retention(D, num_heads=2, key_dim=3),
        "key_dim: expected an even number for rotary positions, got 3",
    ),
    "softcap": (
        lambda: SoftmaxAttention(D, num_heads=2, softcap=0),
        "softcap: expected a finite positive number or None, got 0",
    ),
    "dynamic rope": (
        lambda: SoftmaxAttention(D, num_heads=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        r"rope_scaling: expected a dict with a rope_type of \['linear', 'llama3', 'yarn'\], got 'dynamic'",
    ),
    "rope without its factor": (
        lambda: SoftmaxAttention(D, num_heads=2, rope_scaling={"rope_type": "linear"}),
        "rope_scaling: .* of type 'linear', got .*missing .* 'factor'",
    ),
    "rope scaled but absent": (
        lambda: SoftmaxAttention(D, num_heads=2, rope_theta=None, rope_scaling=YARN),
        "rope_scaling: expected None without rope_theta",
    ),
    "heads do not divide": (
        lambda: LinearAttention(D, num_heads=5),
        "num_heads: expected a divisor of hidden_size 12, got 5",
    ),
    "no heads": (lambda: GatedLinearAttention(D, num_heads=0), "num_heads: expected a positive integer, got 0"),
    "kv heads": (lambda: SoftmaxAttention(D, 4, 3), "num_key_value_heads: expected a divisor of num_heads 4, got 3"),
    "odd rotary": (lambda: SoftmaxAttention(D, num_heads=4), "head_dim: expected an even number for rotary .*, got 3"),
    "window": (lambda: SoftmaxAttention(D, num_heads=2, window=0), "window: expected a positive integer, got 0"),
    "feature map": (
        lambda: LinearAttention(D, feature_map="exp"),
        r"feature_map: expected one of \['elu', .*\], got 'exp'",
    ),
    "expand": (lambda: BaseConv(D, expand=-1), "expand: expected an integer of at least 0, got -1"),
    "activation": (lambda: ShortConvolution(D, activation="gelu"), "activation: expected None or 'silu', got 'gelu'"),
    "gate per": (
        lambda: GatedLinearAttention(D, gate_per="token"),
        "gate_per: expected 'channel' or 'head', got 'token'",
    ),
    "normalizer": (
        lambda: GatedLinearAttention(D, gate_normalizer=0),
        "gate_normalizer: expected a positive number, got 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_bad_options(name: str):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_autocast(mixer: TokenMixer):
    """Outputs under autocast to bf16 are near those in fp32, gradients are fp32, and no layer warns."""
    mixer.float()
    x = torch.randn(2, TOKENS, D)
    with torch.autocast("cpu", torch.bfloat16):
        o = mixer(x)
        o.float().square().sum().backward()
    expected = mixer(
        x
    ).detach()  # compared by norm: with gates down to -40, single elements differ by several roundings
    assert (o.detach().float() - expected).norm() < 0.04 * expected.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())
