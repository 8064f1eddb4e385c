"""JRT's prefix: bidirectional attention, equality with reading the prefix twice if projections are tied, caches."""

import pytest
import torch
from torch import Tensor

from hybridattn.kernels.linear_attention import taylor_linear_attention
from hybridattn.layers import Cache, PrefixLinearAttention, TaylorLinearAttention

D, TOKENS = 12, 17


def make(**options) -> PrefixLinearAttention:
    return PrefixLinearAttention(D, num_heads=2, key_dim=4, **options).double()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_prefix_linear_attention_equals_the_published_formula():
    layer, x, prefix = make(), torch.randn(1, TOKENS, D).double(), 6

    def heads(p: torch.nn.Linear | None) -> Tensor:
        assert p is not None
        return (x[0] @ p.weight.T).unflatten(-1, (2, -1))

    q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
    k_prefix, v_prefix = heads(layer.k_prefix_proj), heads(layer.v_prefix_proj)
    rows = []
    for t in range(TOKENS):
        row = []
        for h in range(2):
            weights, total = 0.0, torch.zeros(6).double()
            seen = [(k[s, h], v[s, h]) for s in range(t + 1)] + [
                (k_prefix[s, h], v_prefix[s, h]) for s in range(prefix)
            ]
            for key, value in seen:
                z = q[t, h] @ key / 2
                weights, total = weights + 1 + z + z * z / 2, total + (1 + z + z * z / 2) * value
            row.append(total / weights)
        rows.append(torch.cat(row))
    close(layer(x, prefix_lengths=torch.tensor([prefix]))[0], torch.stack(rows) @ layer.o_proj.weight.T)


@pytest.mark.parametrize("prefix", [0, 1, 9, TOKENS])
def test_tied_projections_equal_the_second_half_of_reading_twice(prefix: int):
    layer, x = make(tie_prefix=True), torch.randn(1, TOKENS, D).double()
    text = torch.cat((x[:, :prefix], x), 1)
    q, k, v = (p(text).unflatten(-1, (2, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    twice = layer.o_proj(taylor_linear_attention(q, k, v)[0].flatten(2))
    close(layer(x, prefix_lengths=torch.tensor([prefix])), twice[:, prefix:])


def test_without_a_prefix_it_is_taylor_linear_attention():
    layer, x = make(), torch.randn(2, TOKENS, D).double()
    plain = TaylorLinearAttention(D, num_heads=2, key_dim=4).double()
    assert set(layer.state_dict()) - set(plain.state_dict()) == {"k_prefix_proj.weight", "v_prefix_proj.weight"}
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    close(layer(x), plain(x))
    close(layer(x, prefix_lengths=torch.tensor([0, 0])), plain(x))


def test_attention_is_bidirectional_in_the_prefix_and_causal_after_it():
    layer, x, lengths = make(), torch.randn(1, TOKENS, D).double(), torch.tensor([8])
    before = layer(x, prefix_lengths=lengths)
    inside, behind = x.clone(), x.clone()
    inside[:, 7] += 1
    behind[:, 12] += 1
    assert (layer(inside, prefix_lengths=lengths) - before).abs().amin(
        -1
    ).min() > 0  # all tokens attend to it, also the first
    after = layer(behind, prefix_lengths=lengths)
    close(after[:, :12], before[:, :12])
    assert (after - before)[:, 12:].abs().amin(-1).min() > 0


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed: bool):
    layer, x = make(), torch.randn(1, 7, D).double().requires_grad_()
    ends, lengths = (torch.tensor([0, 4, 7]), torch.tensor([3, 1])) if packed else (None, torch.tensor([4]))
    parameters = list(layer.parameters())
    call = lambda x, *_: layer(x, cu_seqlens=ends, prefix_lengths=lengths)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


@torch.no_grad()
def test_a_prompt_then_chunks_and_steps_equal_one_pass():
    layer, x, lengths, cache = make(), torch.randn(2, TOKENS, D).double(), torch.tensor([9, 4]), Cache()
    parts = [layer(x[:, :9], cache=cache, prefix_lengths=lengths)]
    parts += [layer(part, cache=cache) for part in x[:, 9:].split([3, *[1] * 5], 1)]
    close(torch.cat(parts, 1), layer(x, prefix_lengths=lengths))


@torch.no_grad()
def test_packed_prompts_and_chunks_equal_each_sequence_alone():
    layer, lengths, prefixes, more = make(), [5, 0, 11, 1, 8], [5, 0, 3, 1, 0], [2, 3, 0, 4, 1]
    rows = [torch.randn(1, n + m + 2, D).double() for n, m in zip(lengths, more, strict=True)]
    cache = Cache()
    prompt = torch.cat([x[:, :n] for x, n in zip(rows, lengths, strict=True)], 1)
    parts = layer(prompt, torch.tensor([0, *lengths]).cumsum(0), cache=cache, prefix_lengths=torch.tensor(prefixes))
    then = torch.cat([x[:, n : n + m] for x, n, m in zip(rows, lengths, more, strict=True)], 1)
    later = layer(then, torch.tensor([0, *more]).cumsum(0), cache=cache)
    steps = [layer(torch.cat([x[:, i, None] for x in rows]), cache=cache) for i in (-2, -1)]
    for n, (x, first, second) in enumerate(zip(rows, parts[0].split(lengths), later[0].split(more), strict=True)):
        expected = layer(x, prefix_lengths=torch.tensor([prefixes[n]]))[0]
        close(torch.cat((first, second, *(s[n] for s in steps))), expected)


def test_errors_name_bad_prefix_lengths():
    layer, x, cache = make(), torch.randn(2, 5, D).double(), Cache()
    ends = torch.tensor([0, 2, 5])
    with pytest.raises(
        ValueError, match=r"prefix_lengths: expected 0 to each sequence's length .*\[5, 5\], got \[5, 6\]"
    ):
        layer(x, prefix_lengths=torch.tensor([5, 6]))
    with pytest.raises(ValueError, match=r"prefix_lengths: expected 0 to each sequence's length .*, got \[-1, 0\]"):
        layer(x, prefix_lengths=torch.tensor([-1, 0]))
    with pytest.raises(
        ValueError, match=r"prefix_lengths: expected 0 to each sequence's length .*\[2, 3\], got \[3, 0\]"
    ):
        layer(x[:1], cu_seqlens=ends, prefix_lengths=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match=r"prefix_lengths: expected shape \[N=2\], got \[1\]"):
        layer(x, prefix_lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"prefix_lengths: expected int32 or int64 on cpu, got torch.float32 on cpu"):
        layer(x, prefix_lengths=torch.tensor([3.0, 2.0]))
    layer(x, cache=cache, prefix_lengths=torch.tensor([5, 5]))
    with pytest.raises(ValueError, match="prefix_lengths: expected None after the first call with a cache"):
        layer(x, cache=cache, prefix_lengths=torch.tensor([1, 1]))
