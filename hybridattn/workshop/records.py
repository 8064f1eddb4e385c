"""JSON lines that a measurement appends to, so that a run that was cut off goes on where it was."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hybridattn.kernels.runtime.architectures import architecture
from hybridattn.measure.json_lines import JsonLines
from hybridattn.measure.provenance import commit, cpu_name, installed_version, source_sha256

Record = dict[str, Any]


def origin(device: torch.device) -> Record:
    """Where the records of one run come from: device, versions, and the hash of the package's code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "architecture": architecture(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "source_sha256": source_sha256(),
        "commit": commit(Path(__file__)),
    }


def read(file: Path, source: Record) -> list[Record]:
    """The records of a file, if there is one, that agree with all of ``source`` but the commit."""
    lines = JsonLines(file).objects
    return [line for line in lines if all(line.get(name) == source[name] for name in source if name != "commit")]


def writer(file: Path, source: Record) -> Callable[[Record], Record]:
    """A function that appends a record and ``source`` to a file as one object, and returns it.

    Raises:
        ValueError: from that function, after writing: the record's ``reason`` is a CUDA error, after which nothing else
            runs in this process.
    """
    lines = JsonLines(file)

    def write(record: Record) -> Record:
        record = {**record, **source}
        lines.append(record)
        if "CUDA error" in record.get("reason", ""):
            raise ValueError(f"the GPU is lost to this process ({record['reason']}); run again to go on")
        return record

    return write


def check_names(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError for a name that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected one of {list(known)}, got {name!r}")


def reason_of(error: Exception) -> str:
    """Type and message of an error, for a record's ``reason``."""
    return f"{type(error).__name__}: {error}"[:500]
