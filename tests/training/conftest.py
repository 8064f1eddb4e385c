import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridattn.training.train import main

# Small enough for a step to take milliseconds; two micro-batches make a step.
TINY: dict[str, Any] = {
    "config": {
        "vocab_size": 258,
        "hidden_size": 16,
        "mixers": ["gla", "window"],
        "mixer_options": {"gla": {"num_heads": 2}, "window": {"num_heads": 2, "window": 16}},
    },
    "tokenizer": "bytes",
    "length": 64,
    "shuffle": 3,
    "rows_per_step": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "save_steps": 2,
    "logging_steps": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "peak_flops": 1e12,
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven documents of different lengths, one per line."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * (3 + 5 * i)}) + "\n" for i in range(7)))
    return path


@pytest.fixture(scope="session")
def tiny(texts: Path) -> Path:
    """The configuration of a tiny run on ``texts``."""
    path = texts.with_name("tiny.yaml")
    path.write_text(yaml.safe_dump({**TINY, "data": str(texts)}))
    return path


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Callable[..., int]:
    """train(folder, *options) -> exit code of a tiny run in a folder of tmp_path."""

    def train(folder: str, *options: str) -> int:
        return main([str(tiny), "--output_dir", str(tmp_path / folder), *options])

    return train


@pytest.fixture
def curve(tmp_path: Path) -> Callable[[str], list[tuple[float, ...]]]:
    """curve(folder) -> step, loss, norm and rate of every log line in the last checkpoint of a run."""

    def curve(folder: str) -> list[tuple[float, ...]]:
        last = max((tmp_path / folder).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        lines = json.loads((last / "trainer_state.json").read_text())["log_history"]
        return [tuple(x[key] for key in ("step", "loss", "grad_norm", "learning_rate")) for x in lines if "loss" in x]

    return curve
