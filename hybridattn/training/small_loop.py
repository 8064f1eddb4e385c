"""A small language-model training loop for CPUs: Muon for matrices, AdamW for the rest, a budget of steps or seconds.

Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from hybridattn.training.muon import Muon

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run.

    Attributes:
        length: tokens per sequence.
        batch: sequences per step.
        matrix_rate: peak learning rate of Muon (weights of linear layers inside the blocks).
        rate: peak learning rate of AdamW (all other parameters).
        weight_decay: decoupled weight decay of every parameter with two or more dimensions.
        warmup: share of the run with linear warm-up of the learning rates; cosine decay to zero follows.
        clip: maximum norm of all gradients together.
    """

    length: int = 128
    batch: int = 8
    matrix_rate: float = 0.02
    rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    clip: float = 1.0


def train(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train a causal language model on random windows of one text, for a number of steps or seconds.

    The loop uses bf16 autocast on a CPU with bf16 instructions, and the model's own dtype elsewhere. ``steps``,
    ``seed`` and the model determine the result; with ``seconds`` it also depends on the machine's speed.

    Args:
        model: a causal language model; it is in evaluation mode afterwards.
        tokens: token ids ``[time]``, integers.
        steps: number of optimiser steps; exclusive with ``seconds``.
        seconds: wall-clock time to train; at least one step is taken.
        recipe: hyperparameters; `Recipe()` if None.
        seed: seed of the random windows.

    Returns:
        ``steps``, ``seconds``, ``tokens_per_second`` and ``bits_per_token`` (training loss, an exponential average over
        about twenty steps).

    Raises:
        ValueError: not exactly one of ``steps`` and ``seconds``, a value that is not positive, or a text that is too
            short.
        FloatingPointError: the loss is no longer finite.
    """
    recipe = recipe or Recipe()
    budget = check_budget(steps, seconds)
    if len(tokens) <= recipe.length:
        raise ValueError(f"tokens: expected more than {recipe.length} (one sequence), got {len(tokens)}")
    text = torch.from_numpy(tokens.astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    optimizers = build_optimizers(model, recipe)
    model.train()
    step, elapsed, smooth, start = 0, 0.0, math.nan, time.perf_counter()
    with tqdm(total=budget, desc="training", unit="step" if steps else "s", bar_format=BAR) as bar:
        while (spent := step if steps else elapsed) < budget:
            scale_rates(optimizers, schedule(spent / budget, warmup=recipe.warmup))
            starts = torch.randint(len(text) - recipe.length, (recipe.batch, 1), generator=generator)
            batch = text[starts + torch.arange(recipe.length + 1)]
            loss = take_step(model, batch, optimizers, clip=recipe.clip)
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss: expected a finite value, got {loss} at step {step}")
            smooth = loss if step == 0 else 0.95 * smooth + 0.05 * loss
            step, elapsed = step + 1, time.perf_counter() - start
            bar.set_postfix_str(f"{smooth / math.log(2):.3f} bits/token", refresh=False)
            bar.update(min(step if steps else elapsed, budget) - bar.n)
    model.eval()
    return {
        "steps": step,
        "seconds": elapsed,
        "tokens_per_second": step * recipe.batch * recipe.length / elapsed,
        "bits_per_token": smooth / math.log(2),
    }


def check_budget(steps: int | None, seconds: float | None) -> float:
    """Return whichever of ``steps`` and ``seconds`` is given; raise ValueError unless one is, and positive."""
    given = {name: value for name, value in (("steps", steps), ("seconds", seconds)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"steps, seconds: expected exactly one of them, got {' and '.join(given) or 'neither'}")
    ((name, value),) = given.items()
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return value


def build_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Create Muon for the weights of linear layers and AdamW for embeddings, head, convolutions and vectors."""
    outside = {model.get_input_embeddings(), model.get_output_embeddings()}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in outside]
    matrices = {id(module.weight): module.weight for module in linear}
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)]
    if matrices:
        dtype = torch.bfloat16 if has_native_bf16() else torch.float32
        optimizers.append(Muon(matrices.values(), recipe.matrix_rate, weight_decay=recipe.weight_decay, dtype=dtype))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def schedule(progress: float, *, warmup: float) -> float:
    """Return the learning rate, relative to its peak, after a share ``progress`` of a run.

    The schedule is linear warm-up, then cosine decay; at least 0.01.
    """
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return max(0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup)), 0.01)


def scale_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every learning rate to ``share`` times its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * share


def take_step(
    model: PreTrainedModel, tokens: torch.Tensor, optimizers: list[torch.optim.Optimizer], *, clip: float
) -> float:
    """Take one optimiser step on ``tokens``, int64 ``[batch, length + 1]``; return the loss in nats per token."""
    with native_autocast():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def native_autocast() -> torch.autocast:
    """Return bf16 autocast, enabled only if the CPU has bf16 instructions: emulated bf16 would be slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_native_bf16())


def has_native_bf16() -> bool:
    """Whether torch reports bf16 matrix instructions for this CPU (x86: AVX512-BF16 or AMX)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
