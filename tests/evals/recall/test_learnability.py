import numpy as np
import pytest

from hybridattn.evals.recall import learnability, mqar, suite
from hybridattn.evals.recall.parallel import Job, train_all


def test_every_run_counts(monkeypatch: pytest.MonkeyPatch):
    """The best rate is that of the best median; beside it stand the best run, the worst and when they got there."""
    curves = {(0.1, 0): [0.95, 0.2], (0.1, 1): [0, 0.3], (0.1, 2): [0, 1], (0.2, 0): [0.1, 0.91, 0.96]}
    curves |= {(0.2, 1): [0, 0.1, 0.2], (0.2, 2): [0.9, 0.9, 0.99]}

    def trained(jobs: list[Job]) -> list[dict[str, np.ndarray]]:
        assert all(job.looks == (16, learnability.EVERY) and job.options == {"a": 1} for job in jobs)
        return [{"recall": np.array(curves[job.rate, job.seed])} for job in jobs]

    monkeypatch.setattr(learnability, "train_all", trained)
    found = learnability.learnability({"a": 1}, steps=65, seeds=3, rates=(0.1, 0.2), pairs=16)
    runs = {(run["rate"], run["seed"]): (run["recall"], run["steps_to_threshold"]) for run in found.pop("runs")}
    assert runs[0.1, 0] == (0.2, 25)
    assert runs[0.1, 1] == (0.3, None)
    assert runs[0.2, 0] == (0.96, 50)
    assert found == {
        "rate": 0.2,
        "median": 0.96,
        "best": 0.99,
        "worst": 0.2,
        "steps_to_threshold": 37.5,
        "threshold": 0.9,
        "pairs": 16,
    }


def test_the_curve_is_of_recall_on_the_way():
    """Its last point is the recall of the weights that come with it."""
    options, every = suite.model_options(suite.ENTRIES["GLA"]), 4
    (weights,) = train_all([Job(options, 2 * every + 3, 0, looks=(4, every))])
    curve = weights.pop("recall")
    assert len(curve) == 3
    assert mqar.recall(suite.restore(Job(options, 0, 0), weights), 4) == curve[-1]
