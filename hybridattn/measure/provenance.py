"""Provenance of measured figures: versions, machine, threads, commit, configuration and its hash."""

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("hybridattn", "torch", "transformers", "tokenizers", "numpy")


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of the figures of a run.

    Args:
        config: everything that determines the run, as JSON values.

    Returns:
        JSON values: ``date`` (UTC), ``versions``, ``platform``, ``cpu``, ``cores`` (those that this process may use),
        ``threads`` (PyTorch's), ``commit`` (of the package's git checkout, or the hash of its sources without one),
        ``config`` and ``config_sha256`` (``json_sha256``).
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "commit": commit(Path(__file__)) or f"sources-{source_sha256()}",
        "config": config,
        "config_sha256": json_sha256(config),
    }


def source_sha256() -> str:
    """Return the SHA-256 of the package's Python files: figures of the same code stay valid in another commit."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def json_sha256(config: Any) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys and no spaces: equal for equal configurations."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def installed_version(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's name, from /proc/cpuinfo if it exists."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def commit(file: Path) -> str | None:
    """Return the commit of the git checkout that tracks ``file``, None without one.

    It ends in "-dirty" if a tracked file of the checkout has changed.
    """
    for command in (
        ["ls-files", "--error-unmatch", file.name],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    ):
        try:
            done = subprocess.run(["git", *command], cwd=file.parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    return done.stdout.strip()
