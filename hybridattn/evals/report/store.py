"""Store a report's measurements as lines of JSON, in ``measurements.jsonl`` of the report's folder.

The key of a measurement is the hash of its kind and configuration. A changed configuration is a new measurement, and a
measurement in the file is not made again. Each measurement is appended at once, so a run that was killed can resume.
The origin of measurements (device, versions, commit) has a line of its own, to which the measurements' lines refer.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile
from typing import Any

from hybridattn.measure.json_lines import JsonLines
from hybridattn.measure.output_folder import RESULTS
from hybridattn.measure.provenance import json_sha256, provenance

FILE = "measurements.jsonl"
WEIGHTS = "weights"  # folder with the weights of trained models, next to the file
ORIGIN = ("device", "versions", "platform", "cpu", "cores", "commit")  # fields of every measurement's provenance

Measurement = dict[str, Any]
"""``kind``, ``config``, ``figures`` (JSON values), ``date`` (UTC), ``config_sha256`` and ``provenance``."""


class Store:
    """The measurements in a folder, by key, in the order in which they were made.

    Args:
        out: the report's folder, which may not exist yet.

    Raises:
        ValueError: ``out`` is a file or has another kind of report, or a line of the file is not a measurement.
    """

    def __init__(self, out: Path):
        if out.exists() and not out.is_dir():
            raise ValueError(f"out: expected a folder or a new path, got {out}, which is a file")
        if (out / RESULTS).exists() and not (out / FILE).exists():
            raise ValueError(f"out: expected a new path or a folder with {FILE}, got {out} with another report")
        self.out = out
        self.found: dict[str, Measurement] = {}
        self._origins: dict[str, dict[str, Any]] = {}
        self._provenance: dict[str, Any] = {}
        self._lines = JsonLines(out / FILE)
        for number, line in enumerate(self._lines.objects, 1):
            try:
                if "kind" in line:
                    self._keep({**line, "provenance": self._origins[line["origin"]]})
                else:
                    self._origins[line["origin"]] = _checked_origin(line)
            except (ValueError, KeyError) as error:
                where = f"{out / FILE}, line {number}"
                raise ValueError(f"{where}: expected a measurement, got an error: {error}") from error

    def _keep(self, measurement: Measurement) -> None:
        for name in ("config", "figures"):
            if not isinstance(measurement[name], dict):
                raise ValueError(f"{name}: expected an object, got {measurement[name]!r}")
        expected = key(measurement["kind"], measurement["config"])
        if measurement["config_sha256"] != expected:
            raise ValueError(f"config_sha256: expected {expected}, got {measurement['config_sha256']}")
        self.found.pop(expected, None)
        self.found[expected] = measurement  # the newest is the last one

    def get(self, kind: str, config: dict[str, Any]) -> dict[str, Any] | None:
        """Return the figures of a measurement, or None if it has not been made."""
        found = self.found.get(key(kind, config))
        return None if found is None else found["figures"]

    def add(self, kind: str, config: dict[str, Any], figures: dict[str, Any], *, device: str) -> None:
        """Append a measurement; it replaces one of the same kind and configuration.

        Args:
            kind: kind of measurement, such as "prefill".
            config: everything that determines the measurement, as JSON values.
            figures: the results, as JSON values.
            device: name of the GPU or CPU.

        Raises:
            ValueError: device, versions or commit are not known, or another process writes to the folder.
        """
        self._provenance = self._provenance or provenance({})  # once, since a commit during the run would change it
        source = {"device": device, **{name: self._provenance.get(name) for name in ORIGIN[1:]}}
        date = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.append({"kind": kind, "config": config, "figures": figures, "date": date, "provenance": source})

    def append(self, measurement: Measurement) -> None:
        """Append a measurement with its own date and provenance."""
        source = {name: measurement["provenance"].get(name) for name in ORIGIN}
        origin = json_sha256(_checked_origin(source))[:12]
        lines = []
        if origin not in self._origins:
            self._origins[origin] = {"origin": origin, **source}
            lines.append(self._origins[origin])
        line = {name: measurement[name] for name in ("kind", "config", "figures", "date")}
        line |= {"config_sha256": key(line["kind"], line["config"]), "origin": origin}
        self._lines.append(*lines, line)
        self._keep({**line, "provenance": self._origins[origin]})

    def remove(self, is_removed: Callable[[Measurement], bool]) -> None:
        """Remove the measurements for which ``is_removed`` holds."""
        kept = [each for each in self.found.values() if not is_removed(each)]
        file, aside = self.out / FILE, self.out / f"{FILE}.partial"
        aside.unlink(missing_ok=True)  # a run that was killed may have left one
        self._lines = JsonLines(aside)
        self.found, self._origins = {}, {}
        for each in kept:
            self.append(each)
        if kept:
            self._lines.file.replace(file)  # atomic
            self._lines.file = file
        else:
            file.unlink(missing_ok=True)
            self._lines = JsonLines(file)

    def weights_of(self, config: dict[str, Any]) -> Path:
        """Return the path of a trained model's weights, from the configuration of its recall measurement."""
        return self.out / WEIGHTS / f"{key('recall', config)[:24]}.safetensors"


def key(kind: str, config: dict[str, Any]) -> str:
    """Return the hash that identifies a measurement."""
    return json_sha256({"kind": kind, "config": config})


def _checked_origin(origin: dict[str, Any]) -> dict[str, Any]:
    for name in ("device", "versions", "commit"):
        if not origin.get(name):
            raise ValueError(f"{name}: expected a value in a measurement's provenance, got {origin.get(name)!r}")
    return origin


def read(out: Path) -> list[Measurement]:
    """Read the measurements of a report's folder, in the order in which they were made.

    Raises:
        ValueError: the folder has no measurements; or as `Store`.
    """
    found = list(Store(out).found.values())
    if not found:
        raise ValueError(f"report: expected a folder with {FILE}, got {out}")
    return found


def merge(folders: Sequence[Path], out: Path) -> None:
    """Merge the measurements and trained weights of several folders into ``out``; of equal keys the newest remains.

    Measurements that ``out`` already has take part in the merge.

    Raises:
        ValueError: a folder has no measurements; or as `Store`.
    """
    target = Store(out)
    sources = [Store(folder) for folder in folders if read(folder)]
    parts = [(each, source) for source in sources for each in source.found.values()]
    for each, source in sorted(parts, key=lambda part: part[0]["date"]):
        known = target.found.get(each["config_sha256"])
        if known is not None and known["date"] >= each["date"]:
            continue
        if each["kind"] == "recall" and source.weights_of(each["config"]).exists():
            target.weights_of(each["config"]).parent.mkdir(parents=True, exist_ok=True)
            copyfile(source.weights_of(each["config"]), target.weights_of(each["config"]))
        target.append(each)
