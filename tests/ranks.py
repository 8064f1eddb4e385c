"""``python tests/ranks.py FILE FOLDER``: FILE's ``results()`` in four processes that form a gloo group, as JSON."""

import json
import multiprocessing
import runpy
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 4


def run(rank: int, results: Callable[[], Any], folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=100))
    (folder / f"{rank}.json").write_text(json.dumps(results()))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = runpy.run_path(sys.argv[1])["results"], Path(sys.argv[2])  # once, before the processes part
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
