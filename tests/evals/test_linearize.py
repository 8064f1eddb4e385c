"""The command `hybridattn linearize` on a tiny model: training, files, token counts, report and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridattn.cli import main
from hybridattn.evals.linearize import recovery, report
from hybridattn.models.decoder import HybridAttnForCausalLM
from hybridattn.training.trainer import StreamTrainer

pytestmark = pytest.mark.slow

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
    """A folder with predictable texts and a softmax model trained on them."""
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
    """The folder of a complete run."""
    seen: list[torch.Tensor] = []
    trainers: list[tuple[str, float | None]] = []
    step = StreamTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].clone())
        trainers.append((type(self).__name__, getattr(self, "share", None)))
        return step(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamTrainer, "training_step", training_step)
        assert linearize(folder, "out", "--pattern", "1 full : 2 gla", "--distill", "0.4") == 0
    torch.save(seen, folder / "seen.pt")
    (folder / "trainers.json").write_text(json.dumps(trainers))
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


def test_every_stage_has_its_loss(made: Path):
    trainers = json.loads((made.parent / "trainers.json").read_text())
    expected = [["TransferTrainer", None]] * 20 + [["DistillTrainer", 0.4]] * 10 + [["StreamTrainer", None]] * 30
    assert trainers == expected


def test_transfer_teaches_every_new_mixer_and_touches_nothing_else(made: Path, results: dict[str, Any]):
    before, after = (load_file(made / name / "model.safetensors") for name in ("swapped", "transferred"))
    teacher = load_file(made.parent / "teacher" / "model.safetensors")
    trained = {name for name in before if name.startswith(("model.layers.1.mixer.", "model.layers.2.mixer."))}
    assert trained
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in trained), name
        if name not in trained:
            assert torch.equal(after[name], teacher[name.replace(".mixer.", ".self_attn.")])
    assert list(results["attention_errors"]) == ["1", "2"]
    for swapped, transferred in results["attention_errors"].values():
        assert transferred < 0.6 * swapped


def test_the_report_says_what_was_measured(made: Path, results: dict[str, Any]):
    losses = results["losses"]
    assert set(losses) == {"teacher", "swapped", "transferred", "final", "scratch"}
    assert losses["teacher"] < losses["final"] < losses["transferred"] < losses["swapped"] < losses["scratch"]
    expected = (losses["swapped"] - losses["final"]) / (losses["swapped"] - losses["teacher"])
    assert results["recovery"] == recovery(losses) == pytest.approx(expected, rel=1e-12)
    assert results["recovery"] > 0.5
    text = (made / "report.md").read_text()
    assert all(f"{loss:.4f}" in text for loss in losses.values())
    assert f"**{results['recovery']:.1%}**" in text
    assert results["command"] in text
    assert set(results["provenance"]) >= {"commit", "versions", "config_sha256", "threads"}


@pytest.mark.parametrize("swapped", [1.0, 0.9])
def test_there_is_no_recovery_without_an_increase_in_loss(swapped: float, results: dict[str, Any]):
    assert recovery({"teacher": 1.0, "swapped": swapped, "final": 0.8}) is None
    assert "**none, since the swap did not increase the loss**" in report({**results, "recovery": None})


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_the_result_is_a_model_with_its_adapters_merged(made: Path, results: dict[str, Any]):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    assert isinstance(model, HybridAttnForCausalLM)
    assert model.config.mixers == ["full", "gla", "gla"]
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(made / "transferred")
    ids = tokenizer("abcdef abcdef", return_tensors="pt")["input_ids"]
    expected = PeftModel.from_pretrained(base, made / "adapter").eval()(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None).shape[1] == ids.shape[1] + 3


def test_the_same_command_again_trains_nothing_and_another_is_refused(made: Path, results, monkeypatch, capsys):
    monkeypatch.delattr(StreamTrainer, "training_step")
    assert linearize(made.parent, "out", "--pattern", "1 full : 2 gla", "--distill", "0.4") == 0
    assert json.loads((made / "results.json").read_text())["losses"] == results["losses"]
    capsys.readouterr()
    assert linearize(made.parent, "out", "--pattern", "1 full : 2 window") == 2
    assert "pattern: expected '1 full : 2 gla' as in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--pattern", "1 full"), "pattern: expected one that replaces a layer"),
        (("--pattern", "full,gla,dance"), "got 'dance'"),
        (("--pattern", "1 gla", "--transfer_tokens", "511"), "transfer_tokens: expected at least the 512 tokens"),
        (("--pattern", "1 gla", "--lora_tokens", "0"), "lora_tokens: expected at least the 512 tokens"),
        (("--pattern", "1 gla", "--max_steps", "3"), "max_steps: expected no such flag"),
        (("--pattern", "1 gla", "--learning-rate=3"), "learning_rate: expected no such flag"),
        (("--pattern", "1 gla", "--mixer_options", "{"), "mixer_options: expected JSON"),
        (("--pattern", "1 gla", "--mixer_options", '{"gla": {"gates": 1}}'), "('gla'): gates: expected one of"),
        (("--pattern", "1 gla", "--dance", "3"), "--dance"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder: Path, capsys, options: tuple[str, ...], named: str):
    capsys.readouterr()
    assert linearize(folder, "bad", *options) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1
    assert not (folder / "bad").exists()


def test_a_folder_with_other_files_is_refused(folder: Path, capsys):
    assert linearize(folder, "teacher", "--pattern", "1 gla") == 2
    assert "out: expected a new folder" in capsys.readouterr().err
