"""The measurements of a report: one line of JSON each, in ``measurements.jsonl`` of the report's folder.

A measurement is determined by its kind and its configuration, whose hash is its key: a changed configuration is another
measurement, and one that is in the file is not made again. A line is appended as soon as a measurement has been made,
so a run that was killed goes on where it was. Where measurements come from (device, versions, commit) is a line of its
own, which the lines of measurements refer to.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile
from typing import Any

from hybridattn.measure.output_folder import RESULTS
from hybridattn.measure.provenance import json_sha256, provenance

FILE = "measurements.jsonl"
WEIGHTS = "weights"  # folder with the weights of trained models, beside the file
ORIGIN = ("device", "versions", "platform", "cpu", "cores", "commit")  # what every measurement's provenance names

Measurement = dict[str, Any]
"""``kind``, ``config``, ``figures`` (JSON values), ``date`` (UTC), ``config_sha256`` and ``provenance``."""


class Store:
    """The measurements in a folder, by key, in the order in which they were made.

    Args:
        out: the report's folder; it need not exist yet.

    Raises:
        ValueError: ``out`` is a file or a report of another kind, or a line of the file is not a measurement.
    """

    def __init__(self, out: Path):
        if out.exists() and not out.is_dir():
            raise ValueError(f"out: expected a folder or a new path, got {out}, which is a file")
        self.file = out / FILE
        self.found: dict[str, Measurement] = {}
        self._origins: dict[str, dict[str, Any]] = {}
        self._known: dict[str, Any] = {}
        self._size = 0  # bytes of whole lines
        if self.file.is_file():
            self._read()
        elif (out / RESULTS).exists():
            raise ValueError(f"out: expected a new path or a folder with {FILE}, got {out} with another report")

    def _read(self) -> None:
        for number, line in enumerate(self.file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # the process was killed while it wrote this line
            self._size += len(line)
            try:
                content = json.loads(line)
                if "kind" not in content:
                    self._origins[content.pop("origin")] = _checked_origin(content)
                    continue
                expected = key(content["kind"], content["config"])
                if content["config_sha256"] != expected:
                    raise ValueError(f"config_sha256: expected {expected}, got {content['config_sha256']}")
                content["provenance"] = self._origins[content.pop("origin")]
                if missing := {"figures", "date"} - content.keys():
                    raise ValueError(f"expected {sorted(missing)}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.file}, line {number}: expected a measurement, got: {error}") from error
            self._keep(expected, content)

    def get(self, kind: str, config: dict[str, Any]) -> dict[str, Any] | None:
        """The figures of a measurement; None if it has not been made."""
        found = self.found.get(key(kind, config))
        return None if found is None else found["figures"]

    def add(self, kind: str, config: dict[str, Any], figures: dict[str, Any], *, device: str) -> None:
        """Append a measurement; it replaces one of the same kind and configuration.

        Args:
            kind: what was measured.
            config: everything that determines it, as JSON values.
            figures: JSON values.
            device: name of what it was measured on.

        Raises:
            ValueError: device, versions or commit are not known.
        """
        self._known = self._known or provenance({})  # once: of the code that runs, whatever is committed meanwhile
        source = {"device": device, **{name: self._known.get(name) for name in ORIGIN[1:]}}
        date = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append({"kind": kind, "config": config, "figures": figures, "date": date, "provenance": source})

    def _append(self, measurement: Measurement) -> None:
        origin = json_sha256(_checked_origin(measurement["provenance"]))[:12]
        lines = []
        if origin not in self._origins:
            self._origins[origin] = measurement["provenance"]
            lines.append({"origin": origin, **measurement["provenance"]})
        name = key(measurement["kind"], measurement["config"])
        line = {each: measurement[each] for each in ("kind", "config", "figures", "date")}
        lines.append({**line, "config_sha256": name, "origin": origin})
        self._keep(name, {**line, "config_sha256": name, "provenance": measurement["provenance"]})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            file.truncate(self._size)
            self._size += file.write("".join(f"{json.dumps(each)}\n" for each in lines).encode())

    def _keep(self, name: str, measurement: Measurement) -> None:
        self.found.pop(name, None)
        self.found[name] = measurement  # the newest is the last one

    def remove(self, is_old: Callable[[Measurement], bool]) -> None:
        """Remove the measurements for which ``is_old`` holds."""
        kept = [each for each in self.found.values() if not is_old(each)]
        self.found, self._origins, self._size = {}, {}, 0
        whole, self.file = self.file, self.file.with_suffix(".partial")
        for each in kept:
            self._append(each)
        if kept:
            self.file.replace(whole)  # whole or not at all
        else:
            whole.unlink(missing_ok=True)
        self.file = whole


def key(kind: str, config: dict[str, Any]) -> str:
    """The hash that a measurement is known by."""
    return json_sha256({"kind": kind, "config": config})


def _checked_origin(origin: dict[str, Any]) -> dict[str, Any]:
    for name in ("device", "versions", "commit"):
        if not origin.get(name):
            raise ValueError(f"{name}: expected in the provenance of every measurement, got {origin.get(name)!r}")
    return origin


def read(out: Path) -> list[Measurement]:
    """The measurements of a report's folder, in the order in which they were made.

    Raises:
        ValueError: the folder has none, or as `Store`.
    """
    found = list(Store(out).found.values())
    if not found:
        raise ValueError(f"report: expected a folder with {FILE}, got {out}")
    return found


def merge(folders: Sequence[Path], out: Path) -> None:
    """Join the measurements of several folders, and trained weights, in ``out``; of two alike the newer one is kept.

    Where ``out`` has measurements already, it is one of the folders.

    Raises:
        ValueError: a folder has no measurements, or as `Store`.
    """
    target = Store(out)
    parts: Iterable[Measurement] = [*target.found.values(), *(each for folder in folders for each in read(folder))]
    for each in sorted(parts, key=lambda each: each["date"]):
        known = target.found.get(each["config_sha256"])
        if known is None or known["date"] < each["date"]:
            target._append(each)
    for file in (file for folder in folders for file in (folder / WEIGHTS).glob("*")):
        if not (out / WEIGHTS / file.name).exists():
            (out / WEIGHTS).mkdir(parents=True, exist_ok=True)
            copyfile(file, out / WEIGHTS / file.name)
