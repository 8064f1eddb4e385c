"""Run by four processes: every mixer of test_mixers.py on two and four ranks beside itself on one; errors as JSON."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridattn.layers import Cache
from hybridattn.layers.parallel import sequence_parallel, shard_sequence, states

TOKENS, D = 41, 12
TABLE = runpy.run_path(str(Path(__file__).parents[1] / "test_mixers.py"))["MIXERS"]
MIXERS = {name: make for name, make in TABLE.items() if not name.startswith("prefix")}
# Lengths of segments: as even as can be; ranks shorter than windows and convolutions, and some without a token.
LENGTHS: dict[tuple[str, int], list[Any]] = {
    ("contiguous", 2): [TOKENS, [2, 39]],
    ("contiguous", 4): [TOKENS, [0, 36, 1, 4], [17, 0, 24, 0]],
    ("zigzag", 2): [TOKENS, [5, 0, 1, 35]],
    ("zigzag", 4): [TOKENS, [3, 0, 1, 20, 2, 15, 0, 0]],
}
# Sequences that end inside of segments, at their borders and further on; the last tokens belong to none.
PACKED = {"rows": None, "packed": [0, 3, 3, 17, 18, 38], "one sequence": [0, 41]}


def cases() -> Iterator[tuple[str, int, Any, str]]:
    for (layout, ranks), lengths in LENGTHS.items():
        for tokens in lengths:
            for packed in PACKED:
                if packed != "one sequence" or tokens == TOKENS:
                    yield layout, ranks, tokens, packed


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative in L2; what is below 1e-6 counts as nothing (the queries of a window of 1 have no gradient)."""
    if actual.shape != expected.shape:
        return float("inf")
    return (actual - expected).norm().item() / max(expected.norm().item(), 1e-6)


def run(mixer: torch.nn.Module, x: Tensor, weight: Tensor, offsets: Tensor | None, part: Any) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter; ``part`` takes a rank's tokens."""
    leaf = x.clone().requires_grad_()
    o = mixer(part(leaf), cu_seqlens=offsets)
    if offsets is not None:
        weight = weight * (torch.arange(TOKENS) < offsets[-1])[:, None]
    loss = (o * part(weight)).sum()
    return [o.detach(), *torch.autograd.grad(loss, (leaf, *mixer.parameters()))]


def compare(mixer: torch.nn.Module, group: Any, case: tuple[str, int, Any, str]) -> dict[str, float]:
    layout, _, tokens, packed = case
    torch.manual_seed(1)
    offsets = None if PACKED[packed] is None else torch.tensor(PACKED[packed])
    x, weight = (torch.randn(2 if offsets is None else 1, TOKENS, D).double() for _ in range(2))
    o, *grads = run(mixer, x, weight, offsets, lambda x: x)
    with sequence_parallel(group, tokens, layout):
        end = TOKENS if offsets is None else int(offsets[-1])
        real = shard_sequence(torch.arange(TOKENS) < end, 0)
        mine, *parts = run(mixer, x, weight, offsets, shard_sequence)
        o = shard_sequence(o)
    total = torch.cat([grad.flatten() for grad in parts])
    dist.all_reduce(total, group=group)
    parts = [x.view_as(grad) for x, grad in zip(total.split([g.numel() for g in grads]), grads, strict=True)]
    names = ("input", *(name for name, _ in mixer.named_parameters()))
    errors = {f"grad of {name}": error(*pair) for name, *pair in zip(names, parts, grads, strict=True)}
    return {"output": error(mine[:, real], o[:, real]), **errors}


@torch.no_grad()
def compare_caches(mixer: Any, group: Any, layout: str, tokens: Any) -> dict[str, float]:
    """The caches after the sequence, and an output computed from them."""
    torch.manual_seed(1)
    x, more = torch.randn(2, TOKENS, D).double(), torch.randn(2, 1, D).double()
    expected, cache = Cache(), Cache()
    mixer(x, cache=expected)
    with sequence_parallel(group, tokens, layout):
        mixer(shard_sequence(x), cache=cache)
    if set(cache) != set(expected):
        return {"names": float("inf")}
    errors = {name: error(cache[name].double(), expected[name].double()) for name in cache}
    return errors | {"next token": error(mixer(more, cache=cache), mixer(more, cache=expected))}


def main() -> None:
    torch.set_num_threads(1)
    states.TOKENS_AT_ONCE = 7  # several parts of a segment
    dist.init_process_group("gloo")
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    results = {}
    for name, make in MIXERS.items():
        torch.manual_seed(0)
        mixer = make().double()
        for key, parameter in mixer.named_parameters():
            if key.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.3)
        for case in cases():
            if dist.get_rank() < case[1]:
                results[f"{name}: {case}"] = compare(mixer, groups[case[1]], case)
                if case[3] == "rows":
                    results[f"{name}, cache: {case}"] = compare_caches(mixer, groups[case[1]], case[0], case[2])
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


main()
