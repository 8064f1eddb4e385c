"""JSON lines that a measurement appends to, so that a run that was cut off goes on where it was."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hybridattn.kernels.runtime.launch import architecture
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
    lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    return [line for line in lines if all(line.get(name) == source[name] for name in source if name != "commit")]


@contextmanager
def appending(file: Path, source: Record) -> Iterator[Callable[[Record], Record]]:
    """Give a function that writes a record and ``source`` at once, and returns both together.

    Raises:
        ValueError: from that function, after writing: the record's ``reason`` is a CUDA error, after which nothing else
            runs in this process.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:

        def write(record: Record) -> Record:
            record = {**record, **source}
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            if "CUDA error" in record.get("reason", ""):
                raise ValueError(f"the GPU is lost to this process ({record['reason']}); run again to go on")
            return record

        yield write


def check_names(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError for a name that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: expected one of {list(known)}, got {name!r}")


def reason_of(error: Exception) -> str:
    """Type and message of an error, for a record's ``reason``."""
    return f"{type(error).__name__}: {error}"[:500]
