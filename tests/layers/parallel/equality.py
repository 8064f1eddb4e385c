"""Compare every mixer of test_mixers.py on two and four ranks with one rank; tests/ranks.py runs this file."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hybridattn.layers import Cache
from hybridattn.layers.parallel import sequence_parallel, shard_sequence, state_passing

TOKENS, D = 41, 12
TABLE = runpy.run_path(str(Path(__file__).parents[1] / "test_mixers.py"))["MIXERS"]
MIXERS = {name: make for name, make in TABLE.items() if not name.startswith("prefix")}
# Sequences that end within a segment, at its border and in a later one; the last tokens belong to no sequence.
PACKED = {"rows": None, "packed": [0, 3, 3, 17, 18, 38]}


class Case(NamedTuple):
    """One way to cut the tokens: even segments, segments shorter than windows and convolutions, empty segments."""

    layout: str
    ranks: int
    tokens: Any
    packed: str


CASES = [
    Case("contiguous", 2, [2, 39], "packed"),
    Case("contiguous", 4, TOKENS, "rows"),
    Case("contiguous", 4, [0, 36, 0, 5], "rows"),
    Case("zigzag", 2, [5, 0, 1, 35], "packed"),
    Case("zigzag", 4, TOKENS, "packed"),
    Case("zigzag", 4, [3, 0, 1, 20, 2, 15, 0, 0], "rows"),
]


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error. The least divisor is 1e-6: queries of a window of 1 have zero gradients."""
    if actual.shape != expected.shape:
        return float("inf")
    return (actual - expected).norm().item() / max(expected.norm().item(), 1e-6)


class Alone:
    """A mixer's output, and the gradients of its input and of every parameter, on one rank."""

    def __init__(self, mixer: torch.nn.Module, offsets: list[int] | None):
        torch.manual_seed(1)
        self.offsets = None if offsets is None else torch.tensor(offsets)
        self.x, self.weight = (torch.randn(2 if offsets is None else 1, TOKENS, D).double() for _ in range(2))
        self.real = torch.arange(TOKENS) < (TOKENS if offsets is None else offsets[-1])
        self.o, *self.grads = self.run(mixer, lambda x: x)

    def run(self, mixer: torch.nn.Module, part: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the output and gradients for the tokens that ``part`` selects."""
        leaf = self.x.clone().requires_grad_()
        o = mixer(part(leaf), cu_seqlens=self.offsets)
        loss = (o * part(self.weight * self.real[:, None])).sum()
        return [o.detach(), *torch.autograd.grad(loss, (leaf, *mixer.parameters()))]


def compare(mixer: torch.nn.Module, group: Any, case: Case, alone: Alone) -> dict[str, float]:
    with sequence_parallel(case.tokens, group, case.layout):
        o, *grads = alone.run(mixer, shard_sequence)
        expected, real = shard_sequence(alone.o), shard_sequence(alone.real, 0)
    total = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(total, group=group)
    parts = total.split([grad.numel() for grad in grads])
    names = ("input", *(name for name, _ in mixer.named_parameters()))
    errors = {name: error(a, b.flatten()) for name, a, b in zip(names, parts, alone.grads, strict=True)}
    return {"output": error(o[:, real], expected[:, real]), **errors}


@torch.no_grad()
def compare_caches(mixer: Any, group: Any, case: Case) -> dict[str, float]:
    """Return the errors of the caches after the sequence, and of the next token's output."""
    torch.manual_seed(1)
    x, more = torch.randn(2, TOKENS, D).double(), torch.randn(2, 1, D).double()
    expected, cache = Cache(), Cache()
    mixer(x, cache=expected)
    with sequence_parallel(case.tokens, group, case.layout):
        mixer(shard_sequence(x), cache=cache)
    if set(cache) != set(expected):
        return {"names": float("inf")}
    errors = {name: error(cache[name].double(), expected[name].double()) for name in cache}
    return errors | {"next token": error(mixer(more, cache=cache), mixer(more, cache=expected))}


def results() -> dict[str, dict[str, float]]:
    """Return this rank's relative errors by mixer and case."""
    state_passing.TOKENS_AT_ONCE = 7  # several parts of a segment
    groups, found = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}, {}
    for name, make in MIXERS.items():
        torch.manual_seed(0)
        mixer = make().double()
        for key, parameter in mixer.named_parameters():
            if key.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.3)
        alone = {packed: Alone(mixer, PACKED[packed]) for packed in PACKED}
        for case in CASES:
            if dist.get_rank() < case.ranks:
                found[f"{name}, {case}"] = compare(mixer, groups[case.ranks], case, alone[case.packed])
                if case.packed == "rows":
                    found[f"{name}, cache, {case}"] = compare_caches(mixer, groups[case.ranks], case)
    return found
