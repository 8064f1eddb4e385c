import pytest

from hybridattn.evals.recall.capacity import capacity


@pytest.mark.parametrize(
    ("mixer", "options", "pairs", "least", "most"),
    [
        ("full", {}, 256, 1, 1),  # stores all pairs
        ("window", {"window": 64}, 64, 1, 1),
        ("window", {"window": 64}, 256, 0.24, 0.26),  # stores the last 64 pairs
        ("linear", {"key_dim": 64, "feature_map": "identity", "normalize": False}, 4, 1, 1),
        ("linear", {"key_dim": 64, "feature_map": "identity", "normalize": False}, 256, 0.3, 0.9),
        ("taylor", {"key_dim": 16}, 16, 0.9, 1),
        ("taylor", {"key_dim": 8}, 256, 0.02, 0.4),
        ("gla", {"key_dim": 32}, 4, 1, 1),
        ("lightning", {}, 256, 0, 0.05),  # its only head decays within a token
    ],
)
def test_what_a_state_holds(mixer: str, options: dict, pairs: int, least: float, most: float):
    assert least <= capacity(mixer, pairs, **options)["recall"] <= most


def test_more_state_holds_more():
    few, many = (capacity("taylor", 64, key_dim=dim) for dim in (4, 16))
    assert many["state_elements"] == (1 + 16 + 136) * 65 > few["state_elements"]
    assert many["recall"] > few["recall"] + 0.2


def test_it_depends_on_the_seed_alone():
    assert capacity("gla", 32, seed=1) == capacity("gla", 32, seed=1) != capacity("gla", 32, seed=2)


def test_convolutions_keep_no_pairs():
    with pytest.raises(ValueError, match="mixer: expected one with a state of keys and values, got 'conv'"):
        capacity("conv", 4)
