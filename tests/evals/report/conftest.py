from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridattn.evals.report import cells

DEVICE = "a machine"


@pytest.fixture
def write_cell(tmp_path: Path) -> Callable[..., None]:
    """write_cell(name, kind, figures, out=tmp_path, **settings): a cell of the row of this name."""

    def write(name: str, kind: str, figures: dict[str, Any], out: Path = tmp_path, **settings: Any) -> None:
        base = {"name": name, "model": {"preset": name}, "train": {"steps": 100}, "device": DEVICE}
        config = {**base, "dtype": "float32", "threads": 1, **settings}
        if "seconds" in figures:
            figures = {"probe": [1.0] * len(figures["seconds"]), **figures}
        cells.write(out, kind, config, figures, device=DEVICE)

    return write


@pytest.fixture
def report(tmp_path: Path, write_cell: Callable[..., None]) -> Path:
    """A folder with the figures of three made-up rows: attention, a window, and one that is not trained."""
    for name, share, seconds, growth in (
        ("attention", 0.9, 1e-3, 2),
        ("window", 0.2, 1e-4, 1),
        ("other", None, 1e-2, 2),
    ):
        reach = 16 if name == "window" else None
        known = {"parameters": 1000, "reach": reach, "attention_operators": ["<flash>"], "mixers": None}
        write_cell(name, "model", known)
        for tokens in (64, 128):
            size = tokens * 100 if growth == 2 else 5000
            write_cell(name, "state", {"allocated": size, "formula": None if share is None else size}, tokens=tokens)
        for turn in range(2):
            for tokens in (1024, 2048, 4096):
                took = [seconds * (tokens / 1024) ** growth * (1 + 0.01 * i) for i in range(6)]
                figures = {"seconds": took, "peak_bytes": 10 * tokens if turn == 0 else None}
                write_cell(name, "prefill", figures, tokens=tokens, batch=1, round=turn)
            for tokens, batch in ((1024, 1), (4096, 1), (1024, 8)):
                took = [seconds / 10 * (tokens / 1024) ** (growth - 1) * (1 + 0.01 * i) for i in range(6)]
                write_cell(name, "decode", {"seconds": took}, tokens=tokens, batch=batch, graph=False, round=turn)
        tried = [{"batch": 1, "bytes": 5}, {"batch": 2, "bytes": None}]
        write_cell(name, "largest_batch", {"batch": 1, "tried": tried}, tokens=1024, budget=7)
        for seed in range(2) if share is not None else ():
            recall = {"8": round(share + 0.05 * seed, 3), "32": share / 2 + 0.05 * seed}
            curve = [[50, 0.1], [100, recall["32"]]]
            write_cell(name, "recall", {"recall": recall, "curve": curve}, seed=seed, rate=0.01)
    return tmp_path
