# %% [markdown]
"""An operator inside a model of your own: train it for some steps, and check it against the formula.

Run it with `python examples/operator_in_your_model.py`; `make notebooks` makes a notebook of it.
"""

# %%
import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridattn import gated_linear_attention

torch.manual_seed(0)


# %% [markdown]
# A token mixer of one's own: the operator takes `[batch, time, heads, dim]`, and the module decides about the rest.


# %%
class Mixer(nn.Module):
    """Linear attention with a learned decay per token and head."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = nn.Linear(size, 3 * size), nn.Linear(size, heads), nn.Linear(size, size)

    def forward(self, x: Tensor, backend: str | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        g = F.logsigmoid(self.gate(x)) / 4  # natural log of the decay, at most 0
        o, _ = gated_linear_attention(q, k, v, g, backend=backend)
        return self.out(o.flatten(2))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, size: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, size), nn.Linear(size, 256)
        self.mixers = nn.ModuleList([Mixer(size, heads) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.RMSNorm(size) for _ in range(layers + 1)])

    def forward(self, tokens: Tensor, backend: str | None = None) -> Tensor:
        x = self.embed(tokens)
        for norm, mixer in zip(self.norms[:-1], self.mixers, strict=True):
            x = x + mixer(norm(x), backend)
        return self.head(self.norms[-1](x))


# %% [markdown]
# Train it on source code.

# %%
text = torch.tensor(list(inspect.getsource(nn.Module).encode()))
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for _ in range(100):
    starts = torch.randint(len(text) - 129, (8,))
    rows = text[starts[:, None] + torch.arange(129)]
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {sum(losses[-10:]) / 10:.2f} nats per byte")

# %% [markdown]
# The `reference` backend is the formula, token by token: the trained model gives the same logits with it.

# %%
with torch.no_grad():
    torch.testing.assert_close(model(rows), model(rows, backend="reference"), rtol=1e-3, atol=1e-3)
print("the same logits as with the reference backend")
