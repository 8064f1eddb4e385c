# %% [markdown]
"""Recall against bytes of state: three mixers learn associative recall, and a plot shows what each one pays for it.

Run it with `python examples/recall_against_bytes.py`; it writes `recall_against_bytes.png`. It needs
`pip install -e '.[demo]'`; `make notebooks` makes a notebook of it.
"""

# %%
import torch
from matplotlib.figure import Figure

from hybridattn import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.evals.recall import mqar
from hybridattn.evals.report.fronts import front
from hybridattn.evals.speed.memory import cache_sizes

PAIRS, STEPS = 16, 200
SHARED = {"vocab_size": 256, "hidden_size": 64, "mlp": "none", "initializer": "fan_in"}

# %% [markdown]
# Each model is a convolution and one mixer.

# %%
MODELS = {
    "softmax attention": ("full", {"num_heads": 1, "rope_theta": None}),
    "window of 16": ("window", {"num_heads": 1, "rope_theta": None, "window": 16}),
    "BASED, d' = 8": ("taylor", {"num_heads": 1, "key_dim": 8}),
}


def build(mixer: str, options: dict) -> HybridAttnForCausalLM:
    """The model, with weights of a fixed seed."""
    torch.manual_seed(0)
    conv = {"kernel_size": 3, "expand": 0}
    mixer_options = {"conv": conv, mixer: options}
    return HybridAttnForCausalLM(HybridAttnConfig(mixers=["conv", mixer], mixer_options=mixer_options, **SHARED))


# %% [markdown]
# The recall task: pairs of a key and a value, then every key again. The model names the key's value.

# %%
points = {}
for name, (mixer, options) in MODELS.items():
    model = build(mixer, options)
    mqar.train(model, steps=STEPS, batches=mqar.recipe_batches(pairs=(4, 8, PAIRS)))
    recall = mqar.recall(model, PAIRS)
    size = cache_sizes(model, tokens=3 * PAIRS)["allocated"]
    points[name] = (size, recall)
    print(f"{name:<18} recall of {PAIRS} pairs {recall:.3f}, state {size:,} bytes")

# %% [markdown]
# The Pareto front: the models that no other one matches in both and beats in one.

# %%
sizes, recalls = zip(*points.values(), strict=True)
best = front(sizes, recalls)
figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.subplots()
axes.plot([sizes[i] for i in best], [recalls[i] for i in best], "--", color="gray", zorder=0)
for name, point in points.items():
    axes.scatter(*point)
    axes.annotate(name, point, xytext=(6, -12), textcoords="offset points")
axes.set(xlabel=f"bytes of state after {3 * PAIRS} tokens", ylabel=f"recall of {PAIRS} pairs", xscale="log")
figure.savefig("recall_against_bytes.png", dpi=120)
figure  # noqa: B018 (a notebook shows it)
