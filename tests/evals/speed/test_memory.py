import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridattn.evals.speed import memory
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM

CPU = torch.device("cpu")


def ours(*mixers: str) -> HybridAttnForCausalLM:
    options = {"gla": {"num_heads": 1}, "full": {"num_heads": 1}}
    config = HybridAttnConfig(
        vocab_size=32,
        hidden_size=16,
        mixers=list(mixers),
        mixer_options={name: options[name] for name in mixers},
        mlp="none",
    )
    return HybridAttnForCausalLM(config).eval()


@pytest.mark.parametrize("mixers", [("gla",), ("full",), ("gla", "full")])
@pytest.mark.parametrize(("tokens", "batch"), [(7, 1), (300, 3)])
def test_what_is_allocated_is_the_formula(mixers: tuple[str, ...], tokens: int, batch: int):
    sizes = memory.cache_sizes(ours(*mixers), tokens=tokens, batch=batch)
    assert sizes["formula"] == sizes["allocated"]
    assert (sizes["allocated"] or 0) > 0


@pytest.mark.parametrize("window", [None, 8])
def test_caches_of_other_models_are_counted(window: int | None):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(sliding_window=window, **sizes, **heads)).eval()
    kept = 100 if window is None else window - 1
    found = memory.cache_sizes(model, tokens=100, batch=5)
    assert found["formula"] is None
    if window is None:
        assert found["allocated"] == 3 * 2 * 5 * kept * 8 * 4  # layers, keys and values, rows, tokens, dims, bytes
    else:  # whole storages count: a window may be a view of a larger one
        assert (found["allocated"] or 0) >= 3 * 2 * 5 * kept * 8 * 4


def test_the_peak_is_what_a_call_allocates():
    """Temporary tensors count while they live; freeing earlier tensors reduces the peak."""

    def call() -> None:
        kept = torch.ones(1_000_000)
        (kept + 1).sum()
        del kept
        torch.ones(1_500_000)

    peaks = [memory.peak_bytes(call, CPU) for _ in range(2)]
    assert peaks[0] == pytest.approx(8e6, abs=1000)
    assert peaks[0] == peaks[1]
    earlier = [torch.ones(1_000_000)]
    assert memory.peak_bytes(earlier.clear, CPU) == 0


def test_the_largest_batch_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch):
    """With a simulated memory: 1000 bytes per sequence, out of memory beyond 40 sequences."""
    model = ours("gla")
    monkeypatch.setattr(memory, "_one_step", lambda model, tokens, batch: batch)

    def peak(call, device: torch.device) -> int:
        batch = call()
        if batch > 40:
            raise torch.OutOfMemoryError("too much")
        return 1000 * batch

    monkeypatch.setattr(memory, "peak_bytes", peak)
    weights = memory.weight_bytes(model)
    found = memory.largest_batch(model, tokens=4, budget=weights + 23_500)
    assert found["batch"] == 23
    assert {each["batch"]: each["bytes"] for each in found["tried"]}[24] == weights + 24_000
    assert memory.largest_batch(model, tokens=4, budget=weights + 23_000)["batch"] == 23
    assert memory.largest_batch(model, tokens=4, budget=weights + 999)["batch"] == 0
    ran_out = memory.largest_batch(model, tokens=4, budget=10**12)
    assert ran_out["batch"] == 40
    assert {"batch": 64, "bytes": None} in ran_out["tried"]
    assert memory.largest_batch(model, tokens=4, budget=10**12, most=16)["batch"] == 16


def test_other_errors_are_not_results(monkeypatch: pytest.MonkeyPatch):
    def broken(call, device: torch.device) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(memory, "peak_bytes", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        memory.largest_batch(ours("gla"), tokens=4, budget=10**9)


def test_a_larger_budget_holds_more():
    model = ours("full")
    small, large = (memory.largest_batch(model, tokens=2048, budget=n) for n in (10**7, 4 * 10**7))
    assert 1 < small["batch"] < large["batch"]
    assert large == memory.largest_batch(model, tokens=2048, budget=4 * 10**7)


def test_out_of_memory_errors_are_recognised():
    assert memory.out_of_memory(torch.OutOfMemoryError("x"))
    assert memory.out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ..."))
    assert not memory.out_of_memory(RuntimeError("x"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert memory.out_of_memory(error.value)


def test_llama_has_no_formula():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=1, **sizes)).eval()
    assert memory.cache_sizes(model, tokens=10, batch=2) == {"allocated": 2 * 2 * 10 * 8 * 4, "formula": None}
