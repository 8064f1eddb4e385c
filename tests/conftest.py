import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub; subprocesses inherit it

import pytest
import torch

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)
# Besides what its name says, this fills torch.empty and its kin with NaN, so that a read of unwritten memory shows.
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """run_python(code, *, blocked=(), path=None) -> stdout of a fresh Python process at the repository root.

    Packages named in `blocked` are as if not installed; `path` is a folder of further packages. The test fails if the
    process does.
    """

    def run(code: str, *, blocked: tuple[str, ...] = (), path: Path | None = None) -> str:
        absent = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        env = os.environ | ({"PYTHONPATH": str(path)} if path else {})
        done = subprocess.run([sys.executable, "-c", absent + code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[[Path], list[dict[str, Any]]]:
    """run_ranks(file) -> what ``results()`` of a file gives in each of four processes (see tests/ranks.py)."""

    def run(file: Path) -> list[dict[str, Any]]:
        command = [sys.executable, str(ROOT / "tests" / "ranks.py"), str(file), str(tmp_path)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("[0-9].json"))]

    return run
