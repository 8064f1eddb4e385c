import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridattn.evals.report import cells

CONFIG = {"name": "a", "tokens": 3}


def test_a_cell_says_where_it_comes_from(tmp_path: Path):
    cells.write(tmp_path, "prefill", CONFIG, {"seconds": [1.0]}, device="a machine")
    (cell,) = cells.read(tmp_path)
    assert (cell["kind"], cell["config"], cell["figures"]) == ("prefill", CONFIG, {"seconds": [1.0]})
    assert cell["provenance"]["device"] == "a machine"
    assert cell["provenance"]["versions"]["torch"]
    assert cell["provenance"]["commit"]
    assert [path.suffix for path in (tmp_path / cells.CELLS).iterdir()] == [".json"]


def test_cells_are_read_in_the_order_they_were_written(tmp_path: Path):
    for i in range(8):
        cells.write(tmp_path, "model", {"name": i}, {}, device="a machine")
    assert [cell["config"]["name"] for cell in cells.read(tmp_path)] == list(range(8))


def test_another_configuration_is_another_cell(tmp_path: Path):
    assert cells.path_of(tmp_path, "a", CONFIG) == cells.path_of(tmp_path, "a", dict(reversed(CONFIG.items())))
    assert len({cells.path_of(tmp_path, k, c) for k in "ab" for c in (CONFIG, {**CONFIG, "tokens": 4})}) == 4


@pytest.mark.parametrize("name", ["device", "versions", "commit", "date", "config_sha256"])
def test_a_figure_without_its_origin_cannot_be_written(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    known = cells.provenance
    monkeypatch.setattr(cells, "provenance", lambda config: {**known(config), name: None})
    device = "" if name == "device" else "a machine"
    with pytest.raises(ValueError, match=f"{name}: expected in the provenance of every figure"):
        cells.write(tmp_path, "prefill", CONFIG, {"seconds": [1.0]}, device=device)
    assert not (tmp_path / cells.CELLS).exists()


@pytest.mark.parametrize("name", ["device", "versions", "commit", "config_sha256"])
def test_nor_be_read(tmp_path: Path, name: str):
    cells.write(tmp_path, "prefill", CONFIG, {"seconds": [1.0]}, device="a machine")
    (file,) = (tmp_path / cells.CELLS).iterdir()
    cell = json.loads(file.read_text())
    del cell["provenance"][name]
    file.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match=rf"{file.name}: {name}: expected"):
        cells.read(tmp_path)


def test_a_configuration_that_was_changed_by_hand_is_found(tmp_path: Path):
    cells.write(tmp_path, "prefill", CONFIG, {"seconds": [1.0]}, device="a machine")
    (file,) = (tmp_path / cells.CELLS).iterdir()
    cell = json.loads(file.read_text())
    file.write_text(json.dumps({**cell, "config": {**CONFIG, "tokens": 4}}))
    with pytest.raises(ValueError, match="config_sha256: expected"):
        cells.read(tmp_path)


def test_a_folder_without_cells_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"report: expected a folder with cells/\*.json"):
        cells.read(tmp_path)


def test_of_two_cells_the_newer_one_is_merged(
    tmp_path: Path, write_cell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    known = cells.provenance
    for name, day in (("old", "2020-01-01"), ("new", "2021-01-01"), ("middle", "2020-06-01")):
        monkeypatch.setattr(cells, "provenance", lambda config, day=day: {**known(config), "date": day})
        write_cell("row", "prefill", {"from": name}, out=tmp_path / name)
        write_cell(name, "prefill", {"from": name}, out=tmp_path / name)
        (tmp_path / name / cells.KERNELS).write_text(f'{{"same": 1}}\n{{"{name}": 2}}\n')
    folders = [tmp_path / name for name in ("old", "new", "middle")]
    cells.merge(folders, tmp_path / "merged")
    found = {cell["config"]["name"]: cell["figures"]["from"] for cell in cells.read(tmp_path / "merged")}
    assert found == {"row": "new", "old": "old", "new": "new", "middle": "middle"}
    assert len(list(cells.kernel_lines(tmp_path / "merged"))) == 4
    cells.merge([tmp_path / "merged", tmp_path / "old"], tmp_path / "merged")
    assert len(cells.read(tmp_path / "merged")) == 4
    cells.merge([tmp_path / "old"], tmp_path / "merged")  # what is there already is one of the parts
    assert {cell["config"]["name"]: cell["figures"]["from"] for cell in cells.read(tmp_path / "merged")} == found
    assert len(list(cells.kernel_lines(tmp_path / "merged"))) == 4


def test_a_report_of_another_kind_is_not_overwritten(tmp_path: Path, write_cell: Callable[..., None]):
    write_cell("row", "model", {}, out=tmp_path / "cells")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: expected a new path or a folder with cells, got .*other with a report"):
        cells.merge([tmp_path / "cells"], tmp_path / "other")
    with pytest.raises(ValueError, match=r"out: expected a folder or a new path, got .*file, which is a file"):
        cells.merge([tmp_path / "cells"], tmp_path / "file")


@pytest.mark.parametrize("text", ["nope", "[]"])
def test_a_file_that_is_no_cell_is_named(tmp_path: Path, write_cell: Callable[..., None], text: str):
    write_cell("row", "model", {})
    (tmp_path / cells.CELLS / "notes.json").write_text(text)
    with pytest.raises(ValueError, match=r"notes\.json: "):
        cells.read(tmp_path)
    (tmp_path / cells.KERNELS).write_text(text + "{")
    with pytest.raises(ValueError, match=r"kernels\.jsonl: "):
        list(cells.kernel_lines(tmp_path))
