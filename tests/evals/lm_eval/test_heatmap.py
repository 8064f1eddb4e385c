from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imread

from hybridattn.evals.lm_eval.heatmap import Panel, draw


def test_colours_follow_scores_and_gaps_stay_white(tmp_path: Path):
    scores = np.array([[0.0, 1.0], [np.nan, 0.5]])
    draw([Panel("length", "depth", [1024, 4096], [0.0, 1.0], scores)] * 2, tmp_path / "map.png", title="title")
    pixels = imread(tmp_path / "map.png")[..., :3].reshape(-1, 3)
    colours = set(map(tuple, (pixels * 255).round().astype(int).tolist()))
    expected = colormaps["viridis"](np.array([0.0, 0.5, 1.0]), bytes=True)[:, :3]
    assert set(map(tuple, expected.tolist())) <= colours
    assert pixels.shape[0] > 10_000
