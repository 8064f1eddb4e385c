"""One figure, one file: what was measured, of what exactly, and where.

A cell is determined by its kind and configuration, whose hash is its name: a changed configuration is another cell, and
one that is there is not measured again. Files appear whole, so that several processes and machines may write into one
folder, or into folders that are merged later.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybridattn.measure.output_folder import RESULTS
from hybridattn.measure.provenance import json_sha256, provenance

CELLS = "cells"
REQUIRED = ("date", "device", "versions", "commit", "config_sha256")  # of every cell


def key(kind: str, config: dict[str, Any]) -> str:
    """The name of a cell."""
    return json_sha256({"kind": kind, "config": config})[:24]


def path_of(out: Path, kind: str, config: dict[str, Any]) -> Path:
    """The file of a cell in a report's folder."""
    return out / CELLS / f"{kind}-{key(kind, config)}.json"


def write(out: Path, kind: str, config: dict[str, Any], figures: dict[str, Any], *, device: str) -> None:
    """Write a cell; one that is there is replaced.

    Args:
        out: the report's folder.
        kind: what was measured.
        config: everything that determines it, as JSON values.
        figures: JSON values.
        device: name of what it was measured on.

    Raises:
        ValueError: device, versions, commit or hash of the configuration are not known.
    """
    source = {name: value for name, value in provenance(config).items() if name != "config"}
    cell = {"kind": kind, "config": config, "figures": figures, "provenance": {**source, "device": device}}
    check(cell)
    target = path_of(out, kind, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".partial", delete=False, encoding="utf-8") as file:
        json.dump(cell, file, indent=1)
    os.replace(file.name, target)


def check_output(out: Path) -> None:
    """Check that cells may be written in ``out``: nothing is there, or a folder without a report of another kind.

    Raises:
        ValueError: a file, or a report without cells, which the one of cells would overwrite.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder or a new path, got {out}, which is a file")
    if (out / RESULTS).exists() and not (out / CELLS).is_dir():
        raise ValueError(f"out: expected a new path or a folder with {CELLS}, got {out} with a report of another kind")


def check(cell: dict[str, Any]) -> None:
    """Check that a cell says where its figures come from.

    Raises:
        ValueError: something is missing, or the hash is not that of the configuration.
    """
    source = cell.get("provenance", {}) if isinstance(cell, dict) else {}
    for name in REQUIRED:
        if not source.get(name):
            raise ValueError(f"{name}: expected in the provenance of every figure, got {source.get(name)!r}")
    if source["config_sha256"] != json_sha256(cell["config"]):
        raise ValueError(f"config_sha256: expected {json_sha256(cell['config'])}, got {source['config_sha256']}")


def read(out: Path) -> list[dict[str, Any]]:
    """The cells of a report's folder, checked, in the order of their dates.

    Raises:
        ValueError: the folder has no cells, or one has no provenance.
    """
    files = sorted((out / CELLS).glob("*.json"))
    if not files:
        raise ValueError(f"report: expected a folder with {CELLS}/*.json, got {out}")
    cells = []
    for file in files:
        try:
            cell = json.loads(file.read_text(encoding="utf-8"))
            check(cell)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        cells.append(cell)
    return sorted(cells, key=lambda cell: cell["provenance"]["date"])


def merge(folders: Sequence[Path], out: Path) -> None:
    """Copy the cells and kernel measurements of several folders into one; of two with one name, the newer one.

    Where ``out`` has cells already, it is one of the folders.

    Raises:
        ValueError: a folder has no cells, or as `check_output`.
    """
    check_output(out)
    if any((out / CELLS).glob("*.json")) and out.resolve() not in [folder.resolve() for folder in folders]:
        folders = [out, *folders]
    newest: dict[str, tuple[str, Path]] = {}
    for folder in folders:
        read(folder)
        for file in (folder / CELLS).glob("*.json"):
            date = json.loads(file.read_text(encoding="utf-8"))["provenance"]["date"]
            newest[file.name] = max(newest.get(file.name, ("", file)), (date, file))
    (out / CELLS).mkdir(parents=True, exist_ok=True)
    for name, (_, file) in newest.items():
        if file.parent.resolve() != (out / CELLS).resolve():
            shutil.copyfile(file, out / CELLS / name)
    lines = dict.fromkeys(line for folder in folders for line in kernel_lines(folder))
    if lines:
        (out / KERNELS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


KERNELS = "kernels.jsonl"  # what `hybridattn kernels bench` wrote


def kernel_lines(out: Path) -> Iterator[str]:
    """The lines of a report's kernel measurements.

    Raises:
        ValueError: one is no JSON.
    """
    if (out / KERNELS).is_file():
        for line in (out / KERNELS).read_text(encoding="utf-8").splitlines():
            try:
                json.loads(line)
            except ValueError as error:
                raise ValueError(f"{out / KERNELS}: {error}") from error
            yield line
