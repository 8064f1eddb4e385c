"""A file of JSON objects, one per line, to which one process appends; a killed run can continue with the file."""

import json
from pathlib import Path
from typing import Any


class JsonLines:
    """The objects of a file, which are read once, with a method that appends more.

    An incomplete last line, left by a killed process, is ignored and overwritten by the next append.

    Args:
        file: the file; neither it nor its folder has to exist.

    Raises:
        ValueError: a line is not a JSON object; the message names file and line.
    """

    def __init__(self, file: Path):
        self.file = file
        self.objects: list[dict[str, Any]] = []
        self._end = self._whole = 0  # bytes of the file and of its complete lines
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        for number, line in enumerate(lines, 1):
            self._end += len(line)
            if not line.endswith(b"\n"):
                break
            self._whole += len(line)
            try:
                found = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: expected JSON, got: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"{file}, line {number}: expected a JSON object, got {found!r}")
            self.objects.append(found)

    def append(self, *objects: dict[str, Any]) -> None:
        """Append objects to the file in one write.

        Raises:
            ValueError: another process has written to the file since it was read.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            if file.tell() != self._end:
                raise ValueError(f"{self.file}: expected one process that writes, got lines of another one")
            file.truncate(self._whole)
            self._whole += file.write("".join(f"{json.dumps(each)}\n" for each in objects).encode())
            self._end = self._whole
        self.objects += objects
