from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridattn.evals.report.rows import row_key
from hybridattn.evals.report.store import Store

DEVICE = "a machine"


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., None]:
    """add(name, kind, figures, out=tmp_path, **settings): add a measurement to the row of this name."""

    stores: dict[Path, Store] = {}

    def add(name: str, kind: str, figures: dict[str, Any], out: Path = tmp_path, **settings: Any) -> None:
        base = {"name": name, "model": {"preset": name}, "train": {"steps": 100}, "device": DEVICE}
        config = {**base, "dtype": "float32", "threads": 1, **settings}
        if "seconds" in figures:  # timed in rounds of one run, with attention as baseline
            baseline = row_key({**config, "name": "attention", "model": {"preset": "attention"}})
            figures = {"in_round": f"of {settings['round']}", "baseline": baseline, **figures}
        if out not in stores:
            stores[out] = Store(out)
        stores[out].add(kind, config, figures, device=DEVICE)

    return add


@pytest.fixture
def report(tmp_path: Path, add: Callable[..., None]) -> Path:
    """A folder with the measurements of three made-up rows: attention, a window, and one that is not trained."""
    for name, share, seconds, growth in (
        ("attention", 0.9, 1e-3, 2),
        ("window", 0.2, 1e-4, 1),
        ("other", None, 1e-2, 2),
    ):
        reach = 16 if name == "window" else None
        add(name, "model", {"parameters": 1000, "reach": reach, "attention_operators": ["<flash>"], "mixers": None})
        for tokens in (64, 128):
            size = tokens * 100 if growth == 2 else 5000
            add(name, "state", {"allocated": size, "formula": None if share is None else size}, tokens=tokens)
        for turn in range(2):
            drift = 1 + turn  # in the second round, all times double
            for tokens in (1024, 2048, 4096):
                took = [drift * seconds * (tokens / 1024) ** growth * (1 + 0.01 * i) for i in range(6)]
                figures = {"seconds": took, "peak_bytes": 10 * tokens if turn == 0 else None, "probe": [1.0, drift]}
                add(name, "prefill", figures, tokens=tokens, batch=1, round=turn)
            for tokens, batch in ((1024, 1), (4096, 1), (1024, 8)):
                took = [drift * seconds / 10 * (tokens / 1024) ** (growth - 1) * (1 + 0.01 * i) for i in range(6)]
                add(name, "decode", {"seconds": took}, tokens=tokens, batch=batch, graph=False, round=turn)
        tried = [{"batch": 1, "bytes": 5}, {"batch": 2, "bytes": None}]
        add(name, "largest_batch", {"batch": 1, "tried": tried}, tokens=1024, budget=7)
        for seed in range(2) if share is not None else ():
            recall = {"8": round(share + 0.05 * seed, 3), "32": share / 2 + 0.05 * seed}
            curve = [[50, 0.1], [100, recall["32"]]]
            add(name, "recall", {"recall": recall, "curve": curve}, seed=seed, rate=0.01)
    return tmp_path
