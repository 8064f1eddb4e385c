import json
from pathlib import Path

import numpy as np
import pytest

from hybridattn.evals.lm_eval import scores


def sample(length: int, depth: float, load: int, contains: float) -> dict:
    return {"doc": {"length": length, "depth": depth, "load": load, "chance": 1 / load}, "contains": contains}


SAMPLES = [
    sample(1024, 0.0, 4, 1.0),
    sample(1024, 0.0, 4, 0.5),
    sample(1024, 1.0, 5, 0.0),  # 5 counts as 4
    sample(4096, 1.0, 16, 1.0),
]


def test_cells_are_means_of_their_rows():
    found = scores.summary(SAMPLES)
    assert found["rows"] == 4
    assert found["contains"] == 0.625
    assert found["chance"] == pytest.approx((0.25 + 0.25 + 0.2 + 0.0625) / 4)
    assert found["cells"] == [
        {"length": 1024, "depth": 0.0, "load": 4, "rows": 2, "contains": 0.75, "chance": 0.25},
        {"length": 1024, "depth": 1.0, "load": 4, "rows": 1, "contains": 0.0, "chance": 0.2},
        {"length": 4096, "depth": 1.0, "load": 16, "rows": 1, "contains": 1.0, "chance": 0.0625},
    ]
    assert scores.by(found["cells"], "length") == {1024: 0.5, 4096: 1.0}
    assert scores.by(found["cells"], "load") == {4: 0.5, 16: 1.0}


def test_tasks_without_cells_have_a_total():
    found = scores.summary([{"doc": {"text": "a"}, "contains": 1.0}, {"doc": {"text": "b"}, "contains": 0}])
    assert found == {"rows": 2, "contains": 0.5}
    assert scores.panels(found) == []


def test_maps_have_a_gap_where_there_are_no_rows():
    depth, load = scores.panels(scores.summary(SAMPLES))
    assert (depth.down, depth.columns, depth.rows) == ("depth", [1024, 4096], [0.0, 1.0])
    np.testing.assert_array_equal(depth.scores, [[0.75, np.nan], [0.0, 1.0]])
    np.testing.assert_array_equal(load.scores, [[0.5, np.nan], [np.nan, 1.0]])
    assert len(scores.panels(scores.summary(SAMPLES[:2]))) == 0


def test_samples_are_read_by_task(tmp_path: Path):
    for task in ("based_nq_512", "swde"):
        path = tmp_path / "model" / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"task": task}) + "\n")
    assert dict(scores.read_samples(tmp_path)) == {
        "based_nq_512": [{"task": "based_nq_512"}],
        "swde": [{"task": "swde"}],
    }
