"""Write checkpoints atomically and find damaged ones: write to a staging folder, record file sizes, then rename.

A checkpoint is a folder ``checkpoint-STEP`` of transformers' Trainer with two more files. ``stream.json`` holds the
position in the training data. ``complete.json``, written last, holds the size of every other file.
"""

import json
import os
import re
import shutil
from pathlib import Path

COMPLETE = "complete.json"
STAGING = "unfinished"  # folder next to the checkpoints; its files are incomplete


def publish(staged: Path, folder: Path, *, keep: int | None = None) -> Path:
    """Move a staged checkpoint to ``folder``, then delete the oldest complete ones there beyond ``keep`` (None: none).

    Returns:
        The checkpoint's new path.
    """
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _files(staged)}
    (staged / COMPLETE).write_text(json.dumps(sizes, indent=2))
    for path in [*_files(staged), staged]:  # flush to disk before the rename, so that a named checkpoint is complete
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    final = folder / staged.name
    if final.exists():  # an earlier checkpoint of this step, complete or damaged
        shutil.rmtree(final)
    staged.rename(final)
    whole = [path for path in candidates(folder) if not fault(path)]
    for path in whole[:-keep] if keep else []:
        shutil.rmtree(path)
    return final


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the last complete checkpoint, or None, and a description of every damaged one after it."""
    faults = []
    for path in reversed(candidates(folder)):
        if not (reason := fault(path)):
            return path, faults
        faults.append(f"{path}: {reason}")
    return None, faults


def candidates(folder: Path) -> list[Path]:
    """Return the folders named like checkpoints, sorted by step."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def fault(checkpoint: Path) -> str | None:
    """Describe the first file that is missing or whose size changed since it was written; None if there is none."""
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, json.JSONDecodeError):
        return f"{COMPLETE} is missing or damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            return f"{name}: expected {size} bytes, got {'no file' if actual is None else f'{actual} bytes'}"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
