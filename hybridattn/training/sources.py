"""Open a stream of training documents: a data set on the Hub, local files, or the sources of Python's library."""

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .byte_corpus import SMALLEST_FILE, is_held_out, is_skipped

PYTHON = "python"  # the name of the built-in data
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # builders of datasets; others are read as text
COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst)$")


def open_documents(
    data: str,
    *,
    subset: str | None = None,
    split: str = "train",
    sample_by: str = "document",
) -> Any:
    """Open a stream of documents without reading any yet.

    Args:
        data: ``"python"``, the sources of Python's standard library; a file or folder of jsonl, parquet or text; or the
            name of a data set on the Hugging Face Hub.
        subset: subset of a data set on the Hub.
        split: split of a data set on the Hub; for ``"python"``, ``"train"`` or ``"test"`` (one file in 16).
        sample_by: unit of a document in text files: ``"document"`` (a file), ``"paragraph"`` or ``"line"``.

    Returns:
        A ``datasets.IterableDataset``, whose state can be saved and loaded. Text files and the standard library have
        the column "text".

    Raises:
        ValueError: no data of that name, or files that are empty or of several kinds.
    """
    if data == PYTHON:
        return _standard_library(split)
    if Path(data).exists():
        return _files(Path(data), sample_by)
    return _hub(data, subset, split)


def _hub(name: str, subset: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # errors of the network, the Hub and the files have no common class
        raise ValueError(
            f"data: expected {PYTHON!r}, a file, a folder or a data set on the Hub, got {name!r}: {error}"
        ) from error


def _files(path: Path, sample_by: str) -> Any:
    import datasets

    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in below if file.is_file() and not file.name.startswith((".", "_"))]
    if not files:
        raise ValueError(f"data: expected files in {path}, got none")
    if empty := next((file for file in files if not file.stat().st_size), None):
        raise ValueError(f"data: expected no empty file, got {empty}")
    builders = {BUILDERS.get(Path(COMPRESSED.sub("", file.name)).suffix, "text") for file in files}
    if len(builders) > 1:
        raise ValueError(f"data: expected files of one kind in {path}, got {sorted(builders)}")
    (builder,) = builders
    options: Any = {"sample_by": sample_by} if builder == "text" else {}
    # A list keeps the order of the names. The order of a resolved pattern depends on the file system.
    return datasets.load_dataset(builder, data_files=list(map(str, files)), split="train", streaming=True, **options)


def _standard_library(split: str) -> Any:
    import datasets

    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test' of the standard library, got {split!r}")
    root = sysconfig.get_path("stdlib")
    return datasets.IterableDataset.from_generator(_library_texts, gen_kwargs={"root": root, "split": split})


def _library_texts(root: str, split: str) -> Iterator[dict[str, str]]:
    """Yield the files of one split, the same as in `byte_corpus.standard_library`."""
    for path in sorted(Path(root).rglob("*.py")):
        name = path.relative_to(root)
        if not is_skipped(name) and is_held_out(name) == (split == "test") and path.stat().st_size >= SMALLEST_FILE:
            yield {"text": path.read_text(encoding="utf-8", errors="replace")}
