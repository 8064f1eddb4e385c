"""``python -m tests.ranks MODULE FOLDER``: MODULE.results() of four processes that form a gloo group, as JSON files."""

import json
import multiprocessing
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

RANKS = 4


def run(rank: int, module: ModuleType, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=100))
    (folder / f"{rank}.json").write_text(json.dumps(module.results()))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = import_module(sys.argv[1]), Path(sys.argv[2])  # once, before the processes part
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
