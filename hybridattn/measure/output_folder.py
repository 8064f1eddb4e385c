"""Atomic output folders: a report is written to a temporary folder, which replaces the output when it is complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESULTS = "results.json"  # the file that marks a folder as a report


def check_output(out: Path) -> None:
    """Check that a report may be written to ``out``: the path is new, an empty folder, or an earlier report.

    Raises:
        ValueError: ``out`` is a file, a link or a folder with other files, which the report would destroy.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"out: expected a folder or a new path, got {out}, which is a file or a link")
    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).is_file():
        raise ValueError(
            f"out: expected a new path or a folder with an earlier report ({RESULTS}), got {out} with other files"
        )


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Create a temporary folder beside ``out``, which replaces ``out`` if the block ends without an exception.

    After an error or Ctrl-C ``out`` is unchanged. An earlier report at ``out`` is replaced as a whole.

    Yields:
        The temporary folder.

    Raises:
        ValueError: as in ``check_output``.
    """
    out = Path(os.path.abspath(out))
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        aside.chmod(0o755)  # mkdtemp creates folders that only their owner can read
        yield aside
        replace_folder(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, out: Path) -> None:
    """Rename ``new`` to ``out``; a folder at ``out`` is first renamed, and deleted at the end."""
    old = new.with_suffix(".old")
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
