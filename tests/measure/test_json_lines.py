from pathlib import Path

import pytest

from hybridattn.measure.json_lines import JsonLines


def test_lines_are_appended_and_an_incomplete_one_is_overwritten(tmp_path: Path):
    file = tmp_path / "new" / "lines.jsonl"
    JsonLines(file).append({"a": 1}, {"b": 2})
    file.write_bytes(file.read_bytes()[:-3])
    lines = JsonLines(file)
    assert lines.objects == [{"a": 1}]
    lines.append({"c": 3})
    assert JsonLines(file).objects == lines.objects == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize("text", ["nope", "[]"])
def test_a_line_that_is_no_object_raises(tmp_path: Path, text: str):
    (tmp_path / "x.jsonl").write_text(f"{{}}\n{text}\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: expected"):
        JsonLines(tmp_path / "x.jsonl")
