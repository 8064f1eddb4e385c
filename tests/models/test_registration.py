"""Auto classes find this package's models for every order of imports, each in a new process."""

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = """
from hybridattn import HybridAttnConfig
config = HybridAttnConfig(
    vocab_size=32,
    hidden_size=16,
    mixers=["gla", "window"],
    mixer_options={"gla": {"num_heads": 2}, "window": {"num_heads": 2, "window": 4}},
)
"""

ATTENTION = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=32)
llama = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="hybridattn"))
assert llama(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
assert "hybridattn" in ALL_MASK_ATTENTION_FUNCTIONS
"""


BY_CONFIGURATION = f"""{TINY}
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "HybridAttnForCausalLM"
"""
BY_NAME = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("hybridattn", vocab_size=32, hidden_size=16, mixers=["conv"])
assert AutoModelForCausalLM.from_config(config).config.mixers == ["conv"]
"""
# As in a spawned worker process, which unpickles a configuration without calling its constructor.
UNPICKLED = """
import pickle
from transformers import AutoModelForCausalLM
with open(folder + "/config.pickle", "rb") as file:
    config = pickle.load(file)
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "HybridAttnForCausalLM"
"""

# Imports, and the first use after them. Every case then loads a checkpoint and uses attention.
ORDERS = {
    "hybridattn, then transformers": "import hybridattn, transformers" + BY_NAME,
    "transformers, then hybridattn": "import transformers, hybridattn, torch" + ATTENTION,
    "Auto classes, then hybridattn": "from transformers import AutoConfig, AutoModelForCausalLM; import hybridattn",
    "hybridattn, then a model of transformers": "import hybridattn; from transformers import LlamaForCausalLM",
    "a model of transformers, then hybridattn": "from transformers import LlamaForCausalLM; import hybridattn",
    "hybridattn, then PreTrainedModel": "import hybridattn; from transformers import PreTrainedModel",
    "hybridattn, then gradient checkpointing": "import hybridattn; import transformers.modeling_layers",
    "hybridattn, then pipeline": "import hybridattn, torch; from transformers import pipeline" + ATTENTION,
    "our model class first": "from hybridattn import HybridAttnForCausalLM",
    "our configuration class first": BY_CONFIGURATION,
    "our modeling module first": "import hybridattn.models.decoder.modeling",
    "an unpickled configuration first": UNPICKLED,
}


@pytest.fixture(scope="module")
def checkpoint(run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a saved model and its pickled configuration."""
    folder = tmp_path_factory.mktemp("checkpoint")
    run_python(f"""
{TINY}
import pickle
with open({str(folder / "config.pickle")!r}, "wb") as file:
    pickle.dump(config, file)
from hybridattn import HybridAttnForCausalLM
HybridAttnForCausalLM(config).save_pretrained({str(folder)!r})
""")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("first", ORDERS.values(), ids=ORDERS)
def test_auto_classes_load_a_checkpoint(first: str, checkpoint: Path, run_python: Callable[..., str]) -> None:
    run_python(f"""
folder = {str(checkpoint)!r}
{first}
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
names = [type(auto.from_pretrained(folder)).__name__ for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)]
assert names == ["HybridAttnConfig", "HybridAttnModel", "HybridAttnForCausalLM"], names
model = AutoModelForCausalLM.from_pretrained(folder)
assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
{ATTENTION}
llama.save_pretrained(folder + "/llama")
assert type(AutoModelForCausalLM.from_pretrained(folder + "/llama")) is LlamaForCausalLM
""")
