"""The operator bench: what it prints, and that a wrong result is not timed."""

import pytest
import torch

from hybridattn.workshop import bench


def test_the_bench_measures_and_prints_every_ratio(capsys: pytest.CaptureFixture[str]):
    result = bench.run(tokens=64, samples=3)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*result["seconds"], *result["ratios"]))
    assert all(value > 0 for value in (*result["seconds"].values(), *result["ratios"].values()))
    assert result["provenance"]["config"]["tokens"] == 64


def test_useful_operations_of_a_small_case():
    # Per token and head: an outer product and its sum into S, q S, and on average half a chunk of scores and values.
    assert bench.flop_per_token_and_head(3, 5) == 2 * 15 + 2 * 15 + 2 * 32 * 3 + 2 * 32 * 5


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    right = bench.gated_linear_attention

    def wrong(*inputs: torch.Tensor, backend: str | None = None):
        o, state = right(*inputs, backend=backend)
        return o * (1.001 if backend == "torch" else 1), state

    monkeypatch.setattr(bench, "gated_linear_attention", wrong)
    with pytest.raises(RuntimeError, match=r"gated_linear_attention: error 1.0e-03 against the reference"):
        bench.run(tokens=64, samples=3)


@pytest.mark.parametrize("options", [{"tokens": 10}, {"samples": 1}])
def test_bad_options(options: dict[str, int]):
    with pytest.raises(ValueError, match="expected tokens >= 64 and samples >= 3"):
        bench.run(**options)
