"""A hybrid decoder on several ranks, also with FSDP2: loss, gradients, caches, and bytes sent against formulas."""

import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridattn.models.decoder.sizes import parameters_of
from hybridattn.models.parallel_costs import memory, sharded_traffic, traffic

FILE = Path(__file__).with_name("sequence_parallel.py")
WORKER = runpy.run_path(str(FILE))
CONFIG = WORKER["config"]()
# Relative L2, fp32: those of the first law in DESIGN.md.
LOSS, GRADIENTS = 1e-5, 1e-4


def check_errors(ranks: list[dict[str, Any]]) -> None:
    wrong = {
        f"rank {rank}, {case}": errors
        for rank, results in enumerate(ranks)
        for case, errors in results["errors"].items()
        if not all(
            value < (GRADIENTS if name.startswith(("gradients", "weights")) else LOSS) for name, value in errors.items()
        )
    }
    assert not wrong
    assert len(ranks[0]["errors"]) == len(WORKER["CASES"]) + len(WORKER["TWO_RANKS"]) + 3  # generation, and FSDP2 twice


def check_traffic(ranks: list[dict[str, Any]]) -> None:
    """The most bytes of any rank equal the formula: constant for states and windows, linear for full attention."""
    counted = {case: [results["traffic"][case] for results in ranks if case in results["traffic"]] for case in
               ranks[0]["traffic"]}  # fmt: skip
    assert len(counted) == sum(map(len, WORKER["TRAFFIC"].values()))
    for case, (number, layout, tokens) in ((case, case.split()) for case in counted):
        expected = traffic(CONFIG, tokens=int(tokens), ranks=int(number), batch_size=2, layout=layout)
        assert set(expected) == {"states", "convolution", "window", "ring"}
        for kind, sent in expected.items():
            forward = [both[0][kind] for both in counted[case]]
            backward = [both[1][kind] - both[0][kind] for both in counted[case]]
            assert (max(forward), max(backward)) == sent, (case, kind)
    for layout in ("contiguous", "zigzag"):
        short, long = (
            Counter({kind: n for rank in counted[f"4 {layout} {tokens}"] for kind, n in rank[1].items()})
            for tokens in (64, 128)
        )
        assert long["ring"] == 2 * short["ring"] > 0
        assert all(long[kind] == short[kind] for kind in short if kind != "ring")


def check_alibi(ranks: list[dict[str, Any]]) -> None:
    for layout in ("contiguous", "zigzag"):
        expected = traffic(WORKER["alibi_config"](), tokens=WORKER["TOKENS"], ranks=4, batch_size=2, layout=layout)
        sent = zip(*(results["alibi"][layout] for results in ranks), strict=True)
        assert {"keys": tuple(max(x) for x in sent)} == expected


def check_memory(ranks: list[dict[str, Any]]) -> None:
    expected = memory(CONFIG, tokens=WORKER["TOKENS"], ranks=4, batch_size=2)
    assert expected.weights == 16 * sum(parameters_of(CONFIG)) // 4
    assert [4 * results["memory"]["kept"] for results in ranks] == [expected.weights] * 4
    assert [results["memory"]["checkpoints"] for results in ranks] == [expected.checkpoints] * 4


def check_sharded(ranks: list[dict[str, Any]]) -> None:
    """FSDP2 sends the formula's bytes; its peak is within 10 % of ``Memory.gathered``."""
    for name, vocab_size in WORKER["SHARDED"].items():
        config = WORKER["sharded_config"](vocab_size)
        assert [results["sharded"][name]["sent"] for results in ranks] == [sharded_traffic(config, gpus=4)] * 4
        gathered = memory(config, tokens=WORKER["FEW"], ranks=1, gpus=4).gathered
        peaks = [results["sharded"][name]["peak"] for results in ranks]
        assert all(0.9 * gathered <= peak <= 1.1 * gathered for peak in peaks), (name, gathered, peaks)


@pytest.mark.slow
def test_a_decoder_on_two_and_four_ranks(run_ranks: Callable[[Path], list[dict[str, Any]]]):
    ranks = run_ranks(FILE)
    check_errors(ranks)
    check_traffic(ranks)
    check_alibi(ranks)
    check_memory(ranks)
    check_sharded(ranks)
