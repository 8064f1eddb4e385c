"""A hybrid model, from its configuration to generation; saved, and loaded with AutoModel.

Run it with `python examples/hybrid_model.py`. The weights are random, so the text is noise.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hybridattn import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.models.decoder.sizes import cache_spec, parameters_of

config = HybridAttnConfig(
    vocab_size=256,
    hidden_size=128,
    mixers="1 full : 3 gla",  # repeated until there are num_hidden_layers
    num_hidden_layers=8,
    mixer_options={"full": {"num_heads": 4, "num_key_value_heads": 2}, "gla": {"num_heads": 4}},
    eos_token_id=0,
    pad_token_id=0,
)
print("layer  mixer  parameters  elements of the cache after 1,024 and 32,768 tokens")
sizes = [cache_spec(config, batch_size=1, tokens=tokens, dtype=torch.bfloat16) for tokens in (1024, 32768)]
for layer, (mixer, parameters) in enumerate(zip(config.mixers, parameters_of(config), strict=False)):
    elements = [sum(torch.Size(shape).numel() for shape, _ in spec[layer].values()) for spec in sizes]
    print(f"{layer:<6} {mixer:<5} {parameters:>11,} {elements[0]:>12,} {elements[1]:>12,}")

torch.manual_seed(0)
model = HybridAttnForCausalLM(config).eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # `import hybridattn` has registered the Auto classes

# Two prompts of different lengths: padding on the left changes nothing for the real tokens.
texts = [b"Attention is", b"Linear attention has a state of constant size, and"]
longest = max(map(len, texts))
prompts = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
mask = (prompts != 0).long()
together = loaded.generate(prompts, attention_mask=mask, max_new_tokens=16, do_sample=False)
alone = model.generate(prompts[:1, mask[0] == 1], max_new_tokens=16, do_sample=False)
assert together[0, longest:].tolist()[: alone.shape[1] - len(texts[0])] == alone[0, len(texts[0]) :].tolist()
print("generated:", bytes(together[0, longest:].tolist()))

# A prompt in one call and one token at a time: the cache gives the same logits.
cache = DynamicCache(config=config)
with torch.no_grad():
    whole = model(prompts[1:]).logits
    steps = [model(prompts[1:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(longest)]
torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=1e-4)
print("the same logits with and without a cache")
