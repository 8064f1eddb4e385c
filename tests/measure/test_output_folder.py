from pathlib import Path

import pytest

from hybridattn.measure.output_folder import RESULTS, check_output, written_aside


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> text of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_report(out: Path, text: str) -> None:
    """Write a report of one file."""
    with written_aside(out) as folder:
        (folder / RESULTS).write_text(text)


def test_a_folder_appears_whole(tmp_path: Path):
    out = tmp_path / "reports" / "demo"
    with written_aside(out) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text("w")
        (folder / RESULTS).write_text("{}")
        assert not out.exists()
    assert contents(tmp_path) == {"reports/demo/model/weights": "w", f"reports/demo/{RESULTS}": "{}"}


def test_an_earlier_report_is_replaced_whole(tmp_path: Path):
    out = tmp_path / "demo"
    with written_aside(out) as folder:
        (folder / RESULTS).write_text("old")
        (folder / "picture").write_text("old")
    write_report(out, "new")
    assert contents(tmp_path) == {f"demo/{RESULTS}": "new"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_earlier_folder(tmp_path: Path, interruption: type[BaseException]):
    out = tmp_path / "demo"
    write_report(out, "old")

    def fail() -> None:
        with written_aside(out) as folder:
            (folder / RESULTS).write_text("half")
            raise interruption

    with pytest.raises(interruption):
        fail()
    assert contents(tmp_path) == {f"demo/{RESULTS}": "old"}
    assert list(tmp_path.iterdir()) == [out]


def test_other_files_are_not_replaced(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"out: expected a new path or a folder with an earlier report \(results.json\)"
    ):
        check_output(tmp_path)
    with pytest.raises(ValueError, match=r"out: .* which is a file or a link"):
        check_output(tmp_path / "thesis.tex")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"out: .* which is a file or a link"):
        check_output(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(tmp_path / "new" / "folder")
