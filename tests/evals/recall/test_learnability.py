from hybridattn.evals.recall.learnability import learnability, steps_to_threshold


def test_all_runs_at_the_best_rate_are_summarised():
    """The rate with the best median is chosen; best, worst and steps to the threshold are of runs at this rate."""
    curves = {
        (0.1, 0): [0.95, 0.2],
        (0.1, 1): [0, 0.3],
        (0.1, 2): [0, 1],
        (0.2, 0): [0.1, 0.91, 0.96],
        (0.2, 1): [0, 0.1, 0.2],
        (0.2, 2): [0.9, 0.9, 0.99],
    }
    runs = [
        {
            "rate": rate,
            "seed": seed,
            "recall": curve[-1],
            "curve": [(25 * (i + 1), recall) for i, recall in enumerate(curve)],
        }
        for (rate, seed), curve in curves.items()
    ]
    assert learnability(runs) == {
        "rate": 0.2,
        "median": 0.96,
        "best": 0.99,
        "worst": 0.2,
        "steps_to_threshold": 37.5,
        "reached": 2,
        "runs": 3,
        "threshold": 0.9,
    }


def test_a_threshold_that_is_never_reached():
    assert steps_to_threshold([(25, 0.1), (50, 0.89)]) is None
    assert steps_to_threshold([(25, 0.95), (50, 0.2)]) == 25
    assert learnability([{"rate": 1.0, "seed": 0, "recall": 0.1, "curve": [(9, 0.1)]}])["steps_to_threshold"] is None
