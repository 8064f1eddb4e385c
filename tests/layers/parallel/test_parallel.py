"""Outputs, gradients and caches of every mixer on several ranks equal those on one, for any lengths of segments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOLERANCE = 1e-8  # relative L2, in fp64


@pytest.mark.slow
def test_every_mixer_on_two_and_four_ranks_equals_itself_on_one(run_ranks: Callable[[Path], list[dict[str, Any]]]):
    ranks = run_ranks(Path(__file__).with_name("equality.py"))
    assert [len(results) for results in ranks] == [len(ranks[0])] * 2 + [len(ranks[2])] * 2
    assert len(ranks[0]) > len(ranks[2]) > 100
    wrong = {
        f"rank {rank}, {case}": errors
        for rank, results in enumerate(ranks)
        for case, errors in results.items()
        if not max(errors.values()) < TOLERANCE
    }
    assert not wrong
