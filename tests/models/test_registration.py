"""The Auto classes find our models whatever is imported first: every order in a process of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

ORDERS = {
    "hybridattn, then transformers": "import hybridattn, transformers",
    "transformers, then hybridattn": "import transformers, hybridattn",
    "Auto classes, then hybridattn": "from transformers import AutoConfig, AutoModelForCausalLM; import hybridattn",
    "hybridattn, then a model of transformers": "import hybridattn; from transformers import LlamaForCausalLM",
    "a model of transformers, then hybridattn": "from transformers import LlamaForCausalLM; import hybridattn",
    "hybridattn, then PreTrainedModel": "import hybridattn; from transformers import PreTrainedModel",
    "hybridattn, then gradient checkpointing": "import hybridattn; import transformers.modeling_layers",
    "hybridattn, then pipeline": "import hybridattn; from transformers import pipeline",
    "our model class first": "from hybridattn import HybridAttnForCausalLM",
    "our configuration class first": "from hybridattn import HybridAttnConfig",
    "our modeling module first": "import hybridattn.models.decoder.modeling",
}

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


@pytest.fixture(scope="module")
def checkpoint(run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    run_python(f"{TINY}\nfrom hybridattn import HybridAttnForCausalLM as M; M(config).save_pretrained({str(folder)!r})")
    return folder


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_auto_classes_load_a_checkpoint(imports: str, checkpoint: Path, run_python: Callable[..., str]) -> None:
    code = f"""
{imports}
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = {str(checkpoint)!r}
names = [type(auto.from_pretrained(folder)).__name__ for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)]
assert names == ["HybridAttnConfig", "HybridAttnModel", "HybridAttnForCausalLM"], names
model = AutoModelForCausalLM.from_pretrained(folder)
assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
{ATTENTION}
"""
    run_python(code)


@pytest.mark.parametrize("imports", ["import hybridattn, transformers", "import transformers, hybridattn"])
def test_attention_alone(imports: str, run_python: Callable[..., str]) -> None:
    run_python(f"{imports}\nimport torch\n{ATTENTION}")


def test_a_model_is_built_from_a_configuration(run_python: Callable[..., str]) -> None:
    code = f"""
{TINY}
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "HybridAttnForCausalLM"
"""
    run_python(code)


def test_a_configuration_by_name(run_python: Callable[..., str]) -> None:
    run_python("""
import hybridattn
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("hybridattn", vocab_size=32, hidden_size=16, mixers=["conv"])
assert AutoModelForCausalLM.from_config(config).config.mixers == ["conv"]
""")


def test_an_unpickled_configuration_brings_its_model_classes(run_python: Callable[..., str], tmp_path: Path) -> None:
    """As in a worker process that is spawned: it gets a configuration without ever calling its constructor."""
    file = tmp_path / "config.pickle"
    run_python(f"{TINY}\nimport pickle; pickle.dump(config, open({str(file)!r}, 'wb'))")
    run_python(f"""
import pickle
from transformers import AutoModelForCausalLM
config = pickle.load(open({str(file)!r}, 'rb'))
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "HybridAttnForCausalLM"
""")


def test_models_of_transformers_still_load(run_python: Callable[..., str], tmp_path: Path) -> None:
    run_python(f"""
import hybridattn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=32)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained({str(tmp_path)!r})
assert type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})) is LlamaForCausalLM
""")
