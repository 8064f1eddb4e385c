"""The command in small: what it trains, what it leaves, what it counts and says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridattn.cli import main
from hybridattn.evals.linearize import recovery
from hybridattn.models.decoder import HybridAttnForCausalLM
from hybridattn.training.trainer import StreamTrainer

LENGTH, ROWS = 64, 8
STEP = LENGTH * ROWS
TEACHER: dict[str, Any] = {
    "config": {
        "model_type": "llama",
        "attn_implementation": "hybridattn",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
    },
    "tokenizer": "bytes",
    "length": LENGTH,
    "per_device_train_batch_size": ROWS,
    "max_steps": 150,
    "learning_rate": 1e-2,
    "save_steps": 150,
    "report_to": "none",
    "disable_tqdm": True,
}
BUDGETS = ["--transfer_tokens", str(20 * STEP + 100), "--lora_tokens", str(10 * STEP)]
FLAGS = ["--length", str(LENGTH), "--report_to", "none", "--disable_tqdm", "true", "--eval_data", "{texts}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With texts in which what came before says what comes next, and a softmax model trained on them."""
    folder = tmp_path_factory.mktemp("linearize")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(400):
        word = "".join(chr(97 + int(i)) for i in torch.randint(26, (6,), generator=generator))
        lines.append(json.dumps({"text": f"{word} " * 9}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    config = folder / "teacher.yaml"
    config.write_text(yaml.safe_dump({**TEACHER, "data": str(folder / "texts.jsonl")}))
    assert run("train", str(config), "--output_dir", str(folder / "teacher")) == 0
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def linearize(folder: Path, out: str, *options: str) -> int:
    texts = str(folder / "texts.jsonl")
    rates = ["--transfer_learning_rate", "1e-2", "--lora_learning_rate", "5e-3", "--scratch_learning_rate", "1e-2"]
    given = [*BUDGETS, *rates, *(flag.format(texts=texts) for flag in FLAGS), "--data", texts, "--eval_split", "train"]
    return run("linearize", str(folder / "teacher"), str(folder / out), *given, *options)


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """The folder of a whole run."""
    seen: list[torch.Tensor] = []
    step = StreamTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamTrainer, "training_step", training_step)
        assert linearize(folder, "out", "--pattern", "1 full : 2 gla") == 0
    torch.save(seen, folder / "seen.pt")
    return folder / "out"


@pytest.fixture(scope="module")
def results(made: Path) -> dict[str, Any]:
    return json.loads((made / "results.json").read_text())


def test_budgets_are_kept_and_the_control_reads_the_same_tokens(made: Path, results: dict[str, Any]):
    seen = torch.load(made.parent / "seen.pt")
    assert len(seen) == 2 * 30
    assert all(torch.equal(a, b) for a, b in zip(seen[:30], seen[30:], strict=True))
    tokens = results["tokens"]
    assert sum(x.numel() for x in seen[:20]) == tokens["transfer"] == 20 * STEP
    assert sum(x.numel() for x in seen[20:30]) == tokens["lora"] == 10 * STEP
    assert tokens["scratch"] == 30 * STEP
    assert tokens["teacher"] == 150 * STEP
