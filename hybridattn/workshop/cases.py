"""Operators and sizes that ``hybridattn kernels check`` checks; OPERATORS has one entry per operator and variant.

B batch, T time, H key heads, K key dim, V value dim; query and value heads are multiples of the key heads.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridattn.kernels.flash_attention import BlockMask, flash_attention, flash_decode
from hybridattn.kernels.flash_attention.triton.launch import FORWARD, KERNELS, attention_launch, decode_launch
from hybridattn.kernels.linear_attention import (
    features,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_linear_attention,
    gated_linear_attention_step,
    linear_attention,
    linear_attention_step,
    prefix_linear_attention,
    taylor_linear_attention,
)
from hybridattn.kernels.linear_attention.triton.launch import DELTA, STEP, VALUES, chunk_launch, step_launch
from hybridattn.kernels.runtime.architectures import nearest_architecture

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    query_group: int = 1  # query heads per key head
    value_group: int = 1  # value heads per key head
    gates: str = ""  # "resets": 95 % between -0.1 and 0, 5 % between -60 and 0; "hot": all between -60 and 0
    far: str = ""  # name of the input whose batch rows are more than 2^31 elements apart

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value not in ("", 1))


class Operator(NamedTuple):
    """How an operator is called and checked.

    Attributes:
        call: (inputs by name, backend) -> results by name. A step updates the input ``state`` in place and returns it
            as a result too.
        gate: letters of g's shape, "BTHK", "BTH" or "H"; "" without gates.
        delta: whether there is a strength of writing, beta.
        state: whether there is an initial state.
        backward: whether the check includes gradients.
        long: whether T goes up to 64k tokens on a GPU; False for steps, which take one or a few tokens.
        family: folder of the operator's kernels and launch table.
        key_dim: K, if not the default of ``sizes_of``.
        dims: further key and value dims, one for every launch row.
        rows: (architecture, sizes, dtype) -> names of the launch rows that ``backend="triton"`` uses; None if there is
            no triton backend.
    """

    call: Callable[[dict[str, Tensor], str], dict[str, Tensor]]
    gate: str = ""
    delta: bool = False
    state: bool = True
    backward: bool = True
    long: bool = True
    family: str = "linear_attention"
    key_dim: int | None = None
    dims: tuple[int, ...] = ()
    rows: Callable[[str, Sizes, torch.dtype], list[str]] | None = None


def _sequence(function: Callable[..., Any], x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    inputs = [value for name, value in x.items() if name != "state"]
    o, state = function(*inputs, initial_state=x["state"], output_final_state=True, backend=backend)
    return {"o": o, "final state": state}


def _delta(x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    options = {"initial_state": x["state"], "output_final_state": True, "normalize_qk": True, "backend": backend}
    o, state = gated_delta_rule(x["q"], x["k"], x["v"], x.get("g"), x["beta"], **options)
    return {"o": o, "final state": state}  # pyright: ignore[reportReturnType]


def _delta_step(x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    inputs = (x["q"], x["k"], x["v"], x.get("g"), x["beta"], x["state"])
    return {"o": gated_delta_rule_step(*inputs, normalize_qk=True, backend=backend), "state": x["state"]}


def _stateless(function: Callable[..., Any], x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    o = function(*x.values(), backend=backend)
    return {"o": o[0] if isinstance(o, tuple) else o}


def _options(x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Run attention with all options that change scores, and a window to both sides."""
    heads = x["q"].shape[2]
    slopes = torch.linspace(0.5, 0.01, heads, device=x["q"].device)
    options = {"causal": False, "window": (90, 20), "softcap": 3.0, "alibi_slopes": slopes, "sinks": slopes.log()}
    o, lse = flash_attention(*x.values(), **options, return_lse=True, backend=backend)
    return {"o": o, "lse": lse}


def _packed(x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Pack the first row as three sequences, one empty, and two tokens of no sequence; run other rows unpacked."""
    tokens = x["q"].shape[1]
    ends = torch.tensor([0, tokens // 3, tokens // 3, tokens - 2], device=x["q"].device)
    packed = flash_attention(*(y[:1] for y in x.values()), cu_seqlens_q=ends, backend=backend)
    return {"o": packed, "others": flash_attention(*(y[1:] for y in x.values()), backend=backend)}


def _blocks(x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Run attention with a block mask of two thirds of the blocks of 48 tokens."""
    n = torch.arange(-(-x["q"].shape[1] // 48), device=x["q"].device)
    mask = BlockMask.from_dense((n[:, None] + 2 * n) % 3 > 0, 48)
    return {"o": flash_attention(*x.values(), block_mask=mask, backend=backend)}


def _decode(new: int, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Run the last ``new`` tokens over the cache of all keys."""
    lengths = torch.full(x["k"].shape[:1], x["k"].shape[1], device=x["k"].device)
    return {"o": flash_decode(x["q"][:, -new:], x["k"], x["v"], cache_lengths=lengths, backend=backend)}


def _prefix(x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Run with keys and values of the first 40 tokens as the prefix."""
    q, k, v = x.values()
    return {"o": prefix_linear_attention(q, k, v, k[:, :40], v[:, :40], backend=backend)[0]}


def _step(function: Callable[..., Any], x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    return {"o": function(*x.values(), backend=backend), "state": x["state"]}


def _step_rows(architecture: str, sizes: Sizes, dtype: torch.dtype) -> list[str]:
    return [step_launch(architecture, sizes.key_dim).name]


def _chunk_rows(architecture: str, sizes: Sizes, dtype: torch.dtype) -> list[str]:
    operands = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    if operands not in VALUES[nearest_architecture(architecture)]:
        return []
    return [
        chunk_launch(kernel, architecture, sizes.key_dim, sizes.value_dim, operands).name
        for kernel in ("sweep_values", "states", "sweep_keys")
    ]


def _delta_rows(architecture: str, sizes: Sizes, dtype: torch.dtype) -> list[str]:
    operands = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    rows = DELTA[nearest_architecture(architecture)].get(operands, {})
    if not any(sizes.key_dim <= most for most in rows):
        return []
    return [
        chunk_launch(kernel, architecture, sizes.key_dim, sizes.value_dim, operands).name
        for kernel in ("sweep_delta", "sweep_gradients")
    ]


def _taylor_rows(architecture: str, sizes: Sizes, dtype: torch.dtype) -> list[str]:
    """Return the rows for a state with a row per feature; the gradients of keys take at most 128 values per launch."""
    state = replace(sizes, key_dim=features.count(sizes.key_dim), value_dim=min(sizes.value_dim, 128))
    return _chunk_rows(architecture, state, dtype)


def _softmax_rows(architecture: str, sizes: Sizes, dtype: torch.dtype) -> list[str]:
    bits = 8 * dtype.itemsize
    return [attention_launch(name, architecture, sizes.key_dim, sizes.value_dim, bits).name for name in KERNELS]


def _decode_rows(new: int, architecture: str, sizes: Sizes, dtype: torch.dtype) -> list[str]:
    rows = sizes.query_group * new
    return [decode_launch(architecture, rows, sizes.key_dim, sizes.value_dim, 8 * dtype.itemsize).name]


def _decoding(new: int) -> Operator:
    dims = tuple(FORWARD["sm_90"])
    return _softmax(partial(_decode, new), backward=False, dims=dims, rows=partial(_decode_rows, new))


_chunked = partial(Operator, rows=_chunk_rows)
_delta_rule = partial(Operator, _delta, delta=True, rows=_delta_rows)
_features = partial(Operator, state=False, key_dim=16, rows=_taylor_rows)
_one_step = partial(Operator, backward=False, long=False, rows=_step_rows)
_one_delta_step = partial(Operator, _delta_step, delta=True, backward=False, long=False, rows=_step_rows)
_softmax = partial(Operator, state=False, family="flash_attention")

OPERATORS = {
    "linear_attention": _chunked(partial(_sequence, linear_attention)),
    "gated_linear_attention per-channel": _chunked(
        partial(_sequence, gated_linear_attention), "BTHK", dims=tuple(VALUES["sm_90"]["bf16"])
    ),
    "gated_linear_attention per-head": _chunked(partial(_sequence, gated_linear_attention), "BTH"),
    "gated_linear_attention constant": _chunked(partial(_sequence, gated_linear_attention), "H"),
    "gated_delta_rule": _delta_rule(),
    "gated_delta_rule per-channel": _delta_rule("BTHK", dims=tuple(DELTA["sm_90"]["bf16"])),
    "gated_delta_rule per-head": _delta_rule("BTH"),
    "taylor_linear_attention": _features(partial(_stateless, taylor_linear_attention)),
    "prefix_linear_attention": _features(_prefix),
    "flash_attention causal": _softmax(
        partial(_stateless, flash_attention), dims=tuple(FORWARD["sm_90"]), rows=_softmax_rows
    ),
    "flash_attention full": _softmax(partial(_stateless, partial(flash_attention, causal=False)), rows=_softmax_rows),
    "flash_attention window": _softmax(partial(_stateless, partial(flash_attention, window=20)), rows=_softmax_rows),
    "flash_attention options": _softmax(_options, rows=_softmax_rows),
    "flash_attention packed": _softmax(_packed, rows=_softmax_rows),
    "flash_attention blocks": _softmax(_blocks, rows=_softmax_rows),
    "flash_decode 4 tokens": _decoding(4),
    "flash_decode 16 tokens": _decoding(16),
    "linear_attention_step": _one_step(partial(_step, linear_attention_step)),
    "gated_linear_attention_step per-channel": _one_step(partial(_step, gated_linear_attention_step), "BTHK"),
    "gated_linear_attention_step per-head": _one_step(partial(_step, gated_linear_attention_step), "BTH"),
    "gated_linear_attention_step constant": _one_step(partial(_step, gated_linear_attention_step), "H"),
    "gated_delta_rule_step": _one_delta_step(),
    "gated_delta_rule_step per-channel": _one_delta_step("BTHK"),
    "gated_delta_rule_step per-head": _one_delta_step("BTH"),
}


def sizes_of(name: str, on_gpu: bool) -> Iterator[Sizes]:
    """Yield the sizes at which an operator is checked: realistic ones on a GPU, small ones on a CPU."""
    operator = OPERATORS[name]
    gates = ("resets", "hot") if operator.gate else ("",)
    dim = (operator.key_dim or 128) if on_gpu else 6 if operator.key_dim else 24
    if operator.long:
        batch, lengths = (2, (1000, 4096)) if on_gpu else (2, (70, 200))
        for kind in gates:
            for tokens in lengths:
                yield Sizes(batch, tokens, 4, dim, dim, gates=kind)
        yield Sizes(batch, lengths[0], 2, dim, dim, query_group=4, gates=gates[0])
        for other in operator.dims if on_gpu or not operator.state else operator.dims[:2]:
            yield Sizes(1, lengths[0] + 1, 1, other, other - 3, query_group=2, gates=gates[0])
        if on_gpu:
            # The softmax reference stores all scores in fp64: 2 GB for 16k tokens of one head.
            yield Sizes(1, 16384 if operator.family == "flash_attention" else 65536, 1, dim, dim, gates=gates[0])
        far = Sizes(2, 64, 2, dim, dim, gates=gates[0])
    else:
        batch, heads, value_dim = (16, 16, 128) if on_gpu else (2, 2, 40)
        for block_k in STEP["sm_90"]:  # every row, at its largest K and below
            for key_dim in (block_k, block_k - 5):
                yield Sizes(batch, 1, heads, key_dim, value_dim, gates=gates[0])
        for tokens in (1, 4):
            for kind in gates:
                yield Sizes(batch, tokens, heads, 128, value_dim + 1, gates=kind)
        yield Sizes(batch, 2, heads, 64, value_dim, query_group=4, gates=gates[0])
        yield Sizes(batch, 2, heads, 64, value_dim, value_group=2, gates=gates[0])
        far = Sizes(2, 4, 2, 128, 128, gates=gates[0])
    if on_gpu:
        for which in ("q", "k", "v", *(["g"] if "B" in operator.gate else []), *(["state"] if operator.state else [])):
            yield Sizes(**{**asdict(far), "far": which})


def make_inputs(operator: Operator, sizes: Sizes, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Draw signed inputs in fp64, by name.

    Gates are exact in 16 bits, so that their rounding does not count as an error of the kernel.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=torch.float64)
    uniform = partial(torch.rand, generator=generator, device=device, dtype=torch.float64)
    queries, values = sizes.heads * sizes.query_group, sizes.heads * sizes.value_group
    letters = {"B": sizes.batch, "T": sizes.tokens, "H": sizes.heads, "K": sizes.key_dim}
    x = {
        "q": normal(sizes.batch, sizes.tokens, queries, sizes.key_dim),
        "k": normal(sizes.batch, sizes.tokens, sizes.heads, sizes.key_dim),
        "v": normal(sizes.batch, sizes.tokens, values, sizes.value_dim),
    }
    if operator.gate:
        shape = [letters[c] for c in operator.gate]
        hot = -60 * uniform(shape)
        g = hot if sizes.gates == "hot" else torch.where(uniform(shape) < 0.05, hot, -0.1 * uniform(shape))
        x["g"] = (g * 4).round() / 4 if sizes.gates == "hot" else g.bfloat16().half().double()
    if operator.delta:
        x["beta"] = 2 * uniform(sizes.batch, sizes.tokens, values)
    if operator.state:
        x["state"] = normal(sizes.batch, values, sizes.key_dim, sizes.value_dim)
    return x
