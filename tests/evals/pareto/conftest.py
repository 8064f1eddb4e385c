from dataclasses import replace

import pytest

from hybridattn.evals.pareto.suite import Suite, load

NAMES = ("softmax attention", "GLA")


@pytest.fixture
def tiny() -> Suite:
    """Two briefly trained models of the suite "cpu" and a Llama, with every kind of measurement in minimal size."""
    cpu = load("cpu")
    models = {name: {**cpu.models[name], "steps": 3} for name in NAMES}
    llama = {"model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 16}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    return replace(
        cpu,
        models=models | {"Llama": {"model": {"config": llama}, "steps": None}},
        rounds=2,
        seconds=0,
        looks=2,
        state=(16, 64),
        prefill=(64, 128, 256),
        decode=((32, 1), (64, 1), (32, 2)),
        training=(32,),
        memory={"tokens": 64, "budget": 1_000_000},
    )
