"""Records of checks and benchmarks: JSON lines with device, versions and code, so that runs can be continued."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hybridattn.kernels.runtime.architectures import architecture
from hybridattn.measure.json_lines import JsonLines
from hybridattn.measure.provenance import commit, cpu_name, installed_version, source_sha256

Record = dict[str, Any]


def origin(device: torch.device) -> Record:
    """Return the origin of the records of one run: device, versions, hash of the package's code, commit."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "architecture": architecture(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "source_sha256": source_sha256(),
        "commit": commit(Path(__file__)),
    }


def read(file: Path, source: Record) -> list[Record]:
    """Return the records of a file that have the same origin as ``source``, except for the commit.

    A file that does not exist has none.
    """
    lines = JsonLines(file).objects
    return [line for line in lines if all(line.get(name) == source[name] for name in source if name != "commit")]


def writer(file: Path, source: Record) -> Callable[[Record], Record]:
    """Return a function that appends a record, joined with ``source``, to a file and returns the joined record.

    Raises:
        ValueError: the returned function raises it after writing, if the record's ``reason`` is a CUDA error. After a
            CUDA error no kernel can run in this process.
    """
    lines = JsonLines(file)

    def write(record: Record) -> Record:
        record = {**record, **source}
        lines.append(record)
        if "CUDA error" in record.get("reason", ""):
            raise ValueError(f"this process cannot use the GPU after a CUDA error ({record['reason']}); run again")
        return record

    return write


def check_names(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Check that all names are known.

    Raises:
        ValueError: a name is not; the message names the argument.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected one of {list(known)}, got {name!r}")


def reason_of(error: Exception) -> str:
    """Return type and message of an error, at most 500 characters, for a record's ``reason``."""
    return f"{type(error).__name__}: {error}"[:500]
