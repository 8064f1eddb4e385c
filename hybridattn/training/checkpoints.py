"""Checkpoints that are whole or not there: written aside, listed, renamed.

A checkpoint is a folder ``checkpoint-STEP`` of transformers' Trainer with two more files: ``stream.json``, where the
data stands, and ``complete.json``, written last, with the size of every other file.
"""

import json
import os
import re
import shutil
from pathlib import Path

COMPLETE = "complete.json"
STAGING = "unfinished"  # beside the checkpoints; what is in it was interrupted


def publish(staged: Path, folder: Path, *, keep: int | None = None) -> Path:
    """Move a staged checkpoint to ``folder``, then remove the oldest there beyond ``keep`` whole ones."""
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _files(staged)}
    (staged / COMPLETE).write_text(json.dumps(sizes, indent=2))
    for path in [*_files(staged), staged]:  # on the disk before the name is
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    final = folder / staged.name
    if final.exists():  # an earlier one of this step, whole or not
        shutil.rmtree(final)
    staged.rename(final)
    whole = [path for path in candidates(folder) if not fault(path)]
    for path in whole[:-keep] if keep else []:
        shutil.rmtree(path)
    return final


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, if there is one, and what is wrong with those after it."""
    faults = []
    for path in reversed(candidates(folder)):
        if not (reason := fault(path)):
            return path, faults
        faults.append(f"{path}: {reason}")
    return None, faults


def candidates(folder: Path) -> list[Path]:
    """Folders that are named like checkpoints, by step."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or has another size than when it was written."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, json.JSONDecodeError):
        return f"{COMPLETE} is missing or damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            return f"{name} should have {size} bytes and {'is missing' if actual is None else f'has {actual}'}"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
