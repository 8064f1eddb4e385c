"""Training many small models at once: one process and one thread per model being trained."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from hybridattn.evals.recall import mqar
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM

TICK = 10  # steps between two signs of life


class Job(NamedTuple):
    """One model to train on MQAR's CPU recipe.

    Attributes:
        options: of its configuration.
        steps: optimiser steps.
        seed: of everything.
        rate: peak learning rate.
        looks: (pairs, every): recall of so many pairs is measured after every so many steps and after the last, and
            kept beside the weights under ``"recall"``.
    """

    options: dict[str, Any]
    steps: int
    seed: int
    rate: float = 1e-2
    looks: tuple[int, int] | None = None


def train_all(jobs: Sequence[Job]) -> list[dict[str, np.ndarray]]:
    """Train a model per job, as many at a time as there are cores, the longest first; returns their weights in order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a training failed; the others are stopped.
    """
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)
    context = multiprocessing.get_context("spawn")
    taken, reports = context.Value("i", 0), context.SimpleQueue()
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    arguments = ([(i, jobs[i]) for i in order], taken, reports)
    running = start_processes(work, arguments, nprocs=workers, join=False, daemon=True, start_method="spawn")
    assert running is not None  # it is only where join=True
    weights: dict[int, dict[str, np.ndarray]] = {}
    try:
        with tqdm(total=sum(job.steps for job in jobs), desc=f"recall, {len(jobs)} models", unit="step") as bar:
            is_over = False
            while not is_over:
                is_over = running.join(timeout=0.2)
                while not reports.empty():
                    steps, done = reports.get()
                    bar.update(steps)
                    weights.update(done)
    finally:
        for process in running.processes:
            process.terminate()  # pyright: ignore[reportAttributeAccessIssue]
    return [weights[i] for i in range(len(jobs))]


def work(_rank: int, jobs: list[tuple[int, Job]], taken: Any, reports: Any) -> None:
    """One worker: take the next job until none is left; report (steps done since the last report, finished weights)."""
    torch.set_num_threads(1)
    while True:
        with taken.get_lock():
            place, taken.value = taken.value, taken.value + 1
        if place >= len(jobs):
            return
        index, job = jobs[place]
        torch.manual_seed(job.seed)
        model = HybridAttnForCausalLM(HybridAttnConfig(**job.options))
        curve: list[float] = []
        on_step = partial(_on_step, job=job, model=model, reports=reports, curve=curve)
        mqar.train(model, steps=job.steps, seed=job.seed, rate=job.rate, on_step=on_step)
        weights = {name: p.numpy() for name, p in model.state_dict().items()}
        if job.looks is not None:
            weights["recall"] = np.array(curve)
        reports.put((job.steps % TICK, {index: weights}))


def _on_step(step: int, *, job: Job, model: HybridAttnForCausalLM, reports: Any, curve: list[float]) -> None:
    if step % TICK == 0:
        reports.put((TICK, {}))
    if job.looks is not None and (step % job.looks[1] == 0 or step == job.steps):
        model.eval()
        curve.append(mqar.recall(model, job.looks[0]))
        model.train()
