import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridattn.training import small_loop

TEXT = np.tile(np.arange(8, dtype=np.int16), 400)
RECIPE = small_loop.Recipe(length=32, batch=4)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_learns_a_periodic_text():
    trained = model()
    result = small_loop.train(trained, TEXT, steps=60, recipe=RECIPE)
    assert result["steps"] == 60
    assert result["bits_per_token"] < 2
    assert not trained.training
    window = torch.from_numpy(TEXT[:32].astype(np.int64))[None]
    predicted = trained(input_ids=window).logits.argmax(-1)
    assert (predicted[0, 4:-1] == window[0, 5:]).all()


def test_steps_and_seed_determine_the_weights():
    first, second, other = model(), model(), model()
    for each, seed in ((first, 3), (second, 3), (other, 4)):
        small_loop.train(each, TEXT, steps=3, recipe=RECIPE, seed=seed)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    different = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
    assert all(same)
    assert any(different)


def test_a_time_budget_ends_the_run():
    result = small_loop.train(model(), TEXT, seconds=0.5, recipe=RECIPE)
    assert 0.5 <= result["seconds"] < 5
    assert result["tokens_per_second"] == pytest.approx(result["steps"] * 4 * 32 / result["seconds"])


def test_every_parameter_has_one_optimizer_and_only_linear_weights_have_muon():
    net = model()
    adamw, muon = small_loop.build_optimizers(net, RECIPE)
    of = {id(p): (o, g) for o in (adamw, muon) for g in o.param_groups for p in g["params"]}
    assert (
        sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups) == len(of) == len(list(net.parameters()))
    )
    for name, parameter in net.named_parameters():
        optimizer, group = of[id(parameter)]
        assert (optimizer is muon) == ("_proj" in name), name
        assert (group["weight_decay"] == 0) == (parameter.ndim < 2), name


def test_schedule_rises_then_falls():
    rates = [small_loop.schedule(i / 100, warmup=0.05) for i in range(101)]
    assert rates[0] == rates[100] == 0.01
    assert max(rates) == rates[5] == 1
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[2] == pytest.approx(0.4)


def test_a_diverging_run_stops():
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss: expected a finite value, got nan at step 0"):
        small_loop.train(broken, TEXT, steps=3, recipe=RECIPE)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "steps, seconds: expected exactly one of them, got neither"),
        ({"steps": 1, "seconds": 1.0}, "got steps and seconds"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"seconds": math.nan}, "seconds: expected a positive number, got nan"),
    ],
)
def test_a_budget_is_one_positive_number(budget: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small_loop.train(model(), TEXT, **budget)


def test_too_short_a_text_is_named():
    with pytest.raises(ValueError, match=r"tokens: expected more than 32 \(one sequence\), got 32"):
        small_loop.train(model(), TEXT[:32], steps=1, recipe=RECIPE)
