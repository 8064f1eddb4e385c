"""Train many small models on MQAR: in parallel on a CPU, one process with one thread each; one by one on a GPU."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from hybridattn.evals.recall import mqar
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM

TICK = 10  # steps between two progress reports


class Job(NamedTuple):
    """One model to train on MQAR.

    Attributes:
        options: fields of its configuration.
        steps: number of optimiser steps.
        seed: seed of weights and data.
        rate: peak learning rate.
        looks: steps between two tests of recall; 0 for only the final test.
        procedure: a name in `mqar.PROCEDURES`.
        device: "cpu" or "cuda".
    """

    options: dict[str, Any]
    steps: int
    seed: int
    rate: float = 1e-2
    looks: int = 0
    procedure: str = "recipe"
    device: str = "cpu"


class Trained(NamedTuple):
    """Result of one training.

    Attributes:
        weights: weights by name.
        recall: share of correct answers, by number of pairs.
        curve: (steps, recall at the procedure's ``curve_pairs``) at every test, the final one included.
        seconds: duration of training, tests during it included.
    """

    weights: dict[str, np.ndarray]
    recall: dict[int, float]
    curve: list[tuple[int, float]]
    seconds: float


def train_all(
    jobs: Sequence[Job], on_done: Callable[[int, Trained], None] = lambda index, trained: None
) -> list[Trained]:
    """Train one model per job, longest jobs first: on a CPU in one process per core, on a GPU one at a time.

    Args:
        jobs: the models to train, all on one device.
        on_done: called with the index and the result of every finished job.

    Returns:
        The results, in the order of the jobs.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a training failed; all other trainings are stopped.
    """
    if not jobs:
        return []
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)
    context = multiprocessing.get_context("spawn")
    taken, reports = context.Value("i", 0), context.SimpleQueue()
    cores = len(os.sched_getaffinity(0)) if jobs[0].device == "cpu" else 1
    arguments = ([(i, jobs[i]) for i in order], taken, reports)
    running = start_processes(
        work, arguments, nprocs=min(len(jobs), cores), join=False, daemon=True, start_method="spawn"
    )
    assert running is not None  # start_processes returns None only for join=True
    results: dict[int, Trained] = {}
    try:
        with tqdm(total=sum(job.steps for job in jobs), desc=f"recall, {len(jobs)} models", unit="step") as bar:
            is_over = False
            while not is_over:
                is_over = running.join(timeout=0.2)
                while not reports.empty():
                    steps, done = reports.get()
                    bar.update(steps)
                    for index, trained in done.items():
                        results[index] = trained
                        on_done(index, trained)
    finally:
        for process in running.processes:
            process.terminate()  # pyright: ignore[reportAttributeAccessIssue]
    return [results[i] for i in range(len(jobs))]


def work(_rank: int, jobs: list[tuple[int, Job]], taken: Any, reports: Any) -> None:
    """Run a worker: train jobs until none is left; report (steps since the last report, finished jobs by index)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent terminates its workers
    torch.set_num_threads(1)
    while True:
        with taken.get_lock():
            place, taken.value = taken.value, taken.value + 1
        if place >= len(jobs):
            return
        index, job = jobs[place]
        trained = train_one(job, lambda: reports.put((TICK, {})))
        reports.put((job.steps % TICK, {index: trained}))


def train_one(job: Job, on_tick: Callable[[], None] = lambda: None) -> Trained:
    """Train a model; call ``on_tick`` after every `TICK` steps."""
    torch.manual_seed(job.seed)
    model = HybridAttnForCausalLM(HybridAttnConfig(**job.options)).to(torch.device(job.device))  # pyright: ignore
    procedure, curve = mqar.PROCEDURES[job.procedure], []
    start = time.perf_counter()
    mqar.train(
        model,
        steps=job.steps,
        batches=procedure.batches(job.seed, vocab_size=job.options["vocab_size"]),
        rate=job.rate,
        on_step=partial(_on_step, job=job, model=model, curve=curve, on_tick=on_tick),
    )
    seconds = time.perf_counter() - start
    recall = procedure.recall(model)
    weights = {name: p.cpu().numpy() for name, p in model.state_dict().items()}
    return Trained(weights, recall, [*curve, (job.steps, recall[procedure.curve_pairs])], seconds)


def _on_step(
    step: int,
    *,
    job: Job,
    model: HybridAttnForCausalLM,
    curve: list[tuple[int, float]],
    on_tick: Callable[[], None],
) -> None:
    if step % TICK == 0:
        on_tick()
    if job.looks and step % job.looks == 0 and step < job.steps:
        model.eval()
        curve.append((step, mqar.PROCEDURES[job.procedure].curve_recall(model)))
        model.train()
