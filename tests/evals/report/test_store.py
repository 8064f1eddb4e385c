import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridattn.evals.report import store
from hybridattn.evals.report.store import FILE, Store

CONFIG = {"name": "a", "tokens": 3}


def test_a_measurement_has_its_provenance(tmp_path: Path):
    Store(tmp_path).add("prefill", CONFIG, {"seconds": [1.0]}, device="a machine")
    (found,) = store.read(tmp_path)
    assert (found["kind"], found["config"], found["figures"]) == ("prefill", CONFIG, {"seconds": [1.0]})
    assert found["provenance"]["device"] == "a machine"
    assert found["provenance"]["versions"]["torch"]
    assert found["provenance"]["commit"]
    assert found["config_sha256"] == store.key("prefill", dict(reversed(CONFIG.items())))


def test_measurements_are_kept_in_their_order_and_replaced(tmp_path: Path):
    measurements = Store(tmp_path)
    for i in (*range(8), 3):
        measurements.add("model", {"name": i}, {"n": len(measurements.found)}, device="a machine")
    names = [0, 1, 2, 4, 5, 6, 7, 3]
    for known in (measurements, Store(tmp_path)):
        assert [each["config"]["name"] for each in known.found.values()] == names
        assert known.get("model", {"name": 3}) == {"n": 8}
        assert known.get("other", {"name": 3}) is None
    assert len((tmp_path / FILE).read_text().splitlines()) == 1 + 9  # one line for the origin
    measurements.remove(lambda each: each["config"]["name"] > 2)
    assert [each["config"]["name"] for each in Store(tmp_path).found.values()] == [0, 1, 2]
    measurements.add("model", {"name": 9}, {}, device="another")
    assert [each["provenance"]["device"] for each in Store(tmp_path).found.values()] == ["a machine"] * 3 + ["another"]
    measurements.remove(lambda each: True)
    assert not (tmp_path / FILE).exists()


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path):
    for name in ("a", "b"):
        Store(tmp_path).add("model", {"name": name}, {"x": name}, device="a machine")
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-20])
    known = Store(tmp_path)
    assert [each["config"]["name"] for each in known.found.values()] == ["a"]
    known.add("model", {"name": "c"}, {}, device="a machine")
    assert [each["config"]["name"] for each in store.read(tmp_path)] == ["a", "c"]


@pytest.mark.parametrize("name", ["device", "versions", "commit"])
def test_a_measurement_without_its_origin_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    Store(tmp_path).add("prefill", CONFIG, {}, device="a machine")
    origin, *lines = (tmp_path / FILE).read_text().splitlines()
    without = {key: value for key, value in json.loads(origin).items() if key != name}
    (tmp_path / FILE).write_text("\n".join([json.dumps(without), *lines, ""]))
    with pytest.raises(ValueError, match=f"{FILE}, line 1: expected a measurement, got an error: {name}: expected"):
        store.read(tmp_path)
    known = store.provenance
    monkeypatch.setattr(store, "provenance", lambda config: {**known(config), name: None})
    device = "" if name == "device" else "a machine"
    with pytest.raises(ValueError, match=f"{name}: expected a value in a measurement's provenance"):
        Store(tmp_path / "new").add("prefill", CONFIG, {"seconds": [1.0]}, device=device)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("old", "new"), [('"tokens": 3', '"tokens": 4'), ('"figures"', '"x"'), ('{"seconds": [1.0]}', "5")]
)
def test_a_line_that_was_changed_by_hand_is_named(tmp_path: Path, old: str, new: str):
    Store(tmp_path).add("prefill", CONFIG, {"seconds": [1.0]}, device="a machine")
    text = (tmp_path / FILE).read_text()
    assert text.count(old) == 1
    (tmp_path / FILE).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"{FILE}, line 2: expected a measurement, got an error: "):
        store.read(tmp_path)


def test_two_processes_do_not_write_over_each_other(tmp_path: Path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.add("model", {"name": "a"}, {}, device="a machine")
    with pytest.raises(ValueError, match="expected one process that writes"):
        second.add("model", {"name": "b"}, {}, device="a machine")
    first.add("model", {"name": "c"}, {}, device="a machine")
    assert [each["config"]["name"] for each in store.read(tmp_path)] == ["a", "c"]


def test_of_equal_keys_the_newest_measurement_is_merged(tmp_path: Path, add: Callable[..., None]):
    for name, day in (("old", "2020-01-01"), ("new", "2021-01-01"), ("middle", "2020-06-01")):
        for row in ("row", name):
            add(row, "recall", {"from": name}, out=tmp_path / name)
        for each in store.read(tmp_path / name):
            weights = Store(tmp_path / name).weights_of(each["config"])
            weights.parent.mkdir(exist_ok=True)
            weights.write_text(name)
        file = tmp_path / name / FILE
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line | ({"date": day} if "date" in line else {})) + "\n" for line in lines))
    folders = [tmp_path / name for name in ("old", "new", "middle")]
    merged = tmp_path / "merged"
    store.merge(folders, merged)
    found = {each["config"]["name"]: each["figures"]["from"] for each in store.read(merged)}
    assert found == {"row": "new", "old": "old", "new": "new", "middle": "middle"}
    store.merge([tmp_path / "old"], merged)  # measurements already in the folder take part
    assert {each["config"]["name"]: each["figures"]["from"] for each in store.read(merged)} == found
    for each in store.read(merged):  # the weights belong to the newer recall measurement
        assert Store(merged).weights_of(each["config"]).read_text() == each["figures"]["from"]


def test_other_folders_are_refused(tmp_path: Path, add: Callable[..., None]):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"out: expected a new path or a folder with {FILE}, got .* another report"):
        Store(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: expected a folder or a new path, got .*file, which is a file"):
        Store(tmp_path / "file")
    with pytest.raises(ValueError, match=f"report: expected a folder with {FILE}"):
        store.read(tmp_path / "nothing")
