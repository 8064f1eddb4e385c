from pathlib import Path

import pytest

from hybridattn.training.byte_corpus import standard_library
from hybridattn.training.sources import open_documents


def read(*args, **options) -> list[str]:
    return [document["text"] for document in open_documents(*args, **options)]


def test_files_and_folders(tmp_path: Path):
    (tmp_path / "b.jsonl").write_text('{"text": "third"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "first", "id": 0}\n{"text": "second", "id": 1}\n')
    (tmp_path / ".hidden").write_text("not data")
    assert read(str(tmp_path)) == ["first", "second", "third"]
    assert read(str(tmp_path / "b.jsonl")) == ["third"]


def test_parquet(tmp_path: Path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "x.parquet")
    assert read(str(tmp_path / "x.parquet")) == ["a", "b"]


def test_text(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_text("one\ntwo\n\nthree")
    assert read(str(path)) == ["one\ntwo\n\nthree"]
    assert read(str(path), sample_by="line") == ["one", "two", "", "three"]


def test_the_standard_library_is_split_as_elsewhere():
    corpus = standard_library()
    assert len(read("python", split="test")) == corpus.held_out_files


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "expected files in"),
        ({"a.txt": "text", "b.txt": ""}, "b.txt"),
        ({"a.txt": "text", "b.jsonl": "{}"}, "of one kind"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, files: dict[str, str], named: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=named):
        open_documents(str(tmp_path))


def test_a_name_that_is_nowhere():
    with pytest.raises(ValueError, match="no-such/data"):
        open_documents("no-such/data")
    with pytest.raises(ValueError, match="split"):
        open_documents("python", split="validation")
