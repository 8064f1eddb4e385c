import os
from pathlib import Path

from hybridattn.training import checkpoints


def staged(folder: Path, step: int) -> Path:
    path = folder / checkpoints.STAGING / f"checkpoint-{step}"
    (path / "part").mkdir(parents=True)
    (path / "model").write_bytes(b"x" * step)
    (path / "part" / "optimizer").write_bytes(b"y")
    return path


def test_the_last_complete_checkpoint_is_found(tmp_path: Path):
    assert checkpoints.latest(tmp_path) == (None, [])
    paths = [checkpoints.publish(staged(tmp_path, step), tmp_path) for step in (5, 10, 100)]
    assert checkpoints.candidates(tmp_path) == paths
    assert checkpoints.latest(tmp_path) == (paths[-1], [])
    os.truncate(paths[2] / "model", 3)
    (paths[1] / "part" / "optimizer").unlink()
    found, faults = checkpoints.latest(tmp_path)
    assert found == paths[0]
    assert "model: expected 100 bytes, got 3 bytes" in faults[0]
    assert "part/optimizer: expected 1 bytes, got no file" in faults[1]
    (paths[0] / checkpoints.COMPLETE).write_text("{")
    assert checkpoints.latest(tmp_path)[0] is None


def test_a_staged_checkpoint_is_not_found(tmp_path: Path):
    staged(tmp_path, 5)
    assert checkpoints.latest(tmp_path) == (None, [])


def test_old_checkpoints_are_removed_and_a_damaged_one_replaced(tmp_path: Path):
    for step in (5, 10):
        checkpoints.publish(staged(tmp_path, step), tmp_path)
    (tmp_path / "checkpoint-10" / "model").unlink()
    assert checkpoints.publish(staged(tmp_path, 10), tmp_path, keep=2) == tmp_path / "checkpoint-10"
    checkpoints.publish(staged(tmp_path, 15), tmp_path, keep=2)
    assert [path.name for path in checkpoints.candidates(tmp_path)] == ["checkpoint-10", "checkpoint-15"]
    assert checkpoints.latest(tmp_path) == (tmp_path / "checkpoint-15", [])
