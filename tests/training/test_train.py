"""Training runs: interrupted, resumed, refused, on two processes, with adapters."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hybridattn.models.decoder import HybridAttnForCausalLM
from hybridattn.training import checkpoints
from hybridattn.training.arguments import parse
from hybridattn.training.byte_corpus import byte_tokenizer
from hybridattn.training.flops import count
from hybridattn.training.sources import open_documents
from hybridattn.training.train import held_out_batches, main
from hybridattn.training.trainer import StreamTrainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def at_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Call `act` in the next run before the micro-batch of this number, from 1."""
    step, seen = StreamTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == number:
            act()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StreamTrainer, "training_step", training_step)


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(tiny), "--output_dir", str(folder / "whole")]) == 0
    return folder / "whole"


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """The folder of a run without interruption."""
    return shutil.copytree(finished, tmp_path / "whole")


def test_a_run_interrupted_twice_is_the_whole_one_to_the_bit(train, curve, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:  # in the first step, which is completed and saved
        at_micro_batch(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train("cut") == 143
    assert [path.name for path in checkpoints.candidates(tmp_path / "cut")] == ["checkpoint-1"]

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # in the last step: the steps after the checkpoint are repeated
        at_micro_batch(patch, 9, die)
        with pytest.raises(KeyboardInterrupt):
            train("cut")
    (tmp_path / "cut" / checkpoints.STAGING / "checkpoint-5").mkdir(parents=True)  # as if killed while saving
    assert train("cut") == 0
    assert "resuming from" in capsys.readouterr().err
    assert curve("cut") == curve("whole")
    assert [step for step, *_ in curve("whole")] == [3, 6]
    a, b = weights(tmp_path / "cut"), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.slow
def test_a_sigterm_in_the_last_step_ends_a_complete_run(train, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_micro_batch(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train("cut") == 0
    a, b = weights(tmp_path / "cut"), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.slow
def test_held_out_rows_are_of_their_own_split(tiny: Path):
    _, data, run = parse([str(tiny), "--data", "python", "--eval_strategy", "steps", "--eval_steps", "3"])
    tokenizer = byte_tokenizer()
    rows = held_out_batches(tokenizer, 258, data, run)
    assert rows is not None
    text = next(iter(open_documents("python", split="test")))["text"]
    assert rows[0]["input_ids"][0, 1:40].tolist() == list(text.encode()[:39])


def test_a_truncated_checkpoint_is_named_and_the_one_before_used(train, curve, whole, tmp_path, capsys):
    os.truncate(whole / "checkpoint-6" / "optimizer.pt", 1000)
    before = curve("whole")
    assert train("whole", "--resume_from_checkpoint", str(whole / "checkpoint-6")) == 2
    assert "optimizer.pt: expected" in capsys.readouterr().err
    assert train("whole") == 0
    err = capsys.readouterr().err
    assert "skipping" in err
    assert f"resuming from {whole / 'checkpoint-4'}" in err
    assert curve("whole") == before
    assert checkpoints.fault(whole / "checkpoint-6") is None


def test_a_finished_run_is_not_trained_further(train, whole, tmp_path, monkeypatch):
    expected = weights(whole)
    (whole / "model.safetensors").unlink()
    monkeypatch.delattr(StreamTrainer, "training_step")
    assert train("whole") == 0
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(whole).items())


def test_the_result_generates_and_continues_elsewhere(train, whole, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(whole), AutoModelForCausalLM.from_pretrained(whole)
    assert isinstance(model, HybridAttnForCausalLM)
    tokens = model.generate(**tokenizer("docu", return_tensors="pt"), max_new_tokens=4, eos_token_id=None)
    assert tokens.shape == (1, 8)


def test_other_data_in_the_same_folder_is_refused(train, whole, capsys):
    assert train("whole", "--length", "32") == 2
    assert "length: expected 64" in capsys.readouterr().err
    for name, value, kept in (
        ("data_seed", "7", None),
        ("seed", "7", 42),
        ("rows_per_step", "8", 4),
        ("shuffle", "4", 3),
    ):
        assert train("whole", f"--{name}", value) == 2
        assert f"{name}: expected {kept} as in" in capsys.readouterr().err


def test_another_model_in_the_same_folder_is_refused(train, whole, capsys):
    config = AutoConfig.from_pretrained(whole).to_dict()
    options = {"gla": {"num_heads": 2, "gate_min": -0.5}, "window": {"num_heads": 2, "window": 16}}
    shape = {name: config[name] for name in ("vocab_size", "hidden_size", "mixers")}
    assert train("whole", "--config", json.dumps({**shape, "mixer_options": options})) == 2
    assert "model: expected" in capsys.readouterr().err


def test_errors_of_evaluation_data_name_eval_data(train, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    options = ["--eval_strategy", "steps", "--eval_data", str(tmp_path / "empty")]
    assert train("nothing", *options) == 2
    assert "eval_data: data: expected files in" in capsys.readouterr().err
    assert train("no-split", *options[:2], "--eval_data", "python", "--eval_split", "valid") == 2
    assert "eval_data: split: expected 'train' or 'test'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_does_not_depend_on_how_it_is_divided(train, curve, whole):
    assert train("other", "--per_device_train_batch_size", "1", "--dataloader_num_workers", "1") == 0
    for left, right in zip(curve("other"), curve("whole"), strict=True):
        assert left == pytest.approx(right, rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_to_the_same_loss(tiny: Path, curve, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "1"]
    options += ["--eval_strategy", "steps", "--eval_steps", "6", "--eval_data", "python", "--eval_rows", "5"]
    done = subprocess.run(
        [*command, "hybridattn.training.train", str(tiny), *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for left, right in zip(curve("two"), curve("whole"), strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    assert len(list((tmp_path / "two" / "checkpoint-6").glob("rng_state_*.pth"))) == 2


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_batch(train, tmp_path, monkeypatch, capsys, value: str):
    compute = StreamTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * (float(value) if self.state.global_step == 3 else 1)

    monkeypatch.setattr(StreamTrainer, "compute_loss", compute_loss)
    assert train("nan") == 1
    assert f"got {value} at step 4" in capsys.readouterr().err
    saved = torch.load(tmp_path / "nan" / "not-finite-step4-process0.pt")
    assert saved["input_ids"].shape == (1, 2 * 64)
    assert checkpoints.latest(tmp_path / "nan")[0] == tmp_path / "nan" / "checkpoint-2"


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch, capsys):
    """A gradient that is not finite, from a finite loss, gives such weights."""
    step = StreamTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            model.model.norm.weight.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(StreamTrainer, "training_step", training_step)
    assert train("inf") == 1
    assert "parameters: expected finite values, got inf or nan at step 4" in capsys.readouterr().err
    assert checkpoints.latest(tmp_path / "inf")[0] == tmp_path / "inf" / "checkpoint-2"


@pytest.mark.slow
def test_log_lines(train, tmp_path):
    assert train("logged", "--report_to", "tensorboard", "--eval_strategy", "steps", "--eval_data", "python") == 0
    history = json.loads((tmp_path / "logged" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    flops = count(AutoModelForCausalLM.from_pretrained(tmp_path / "logged"))
    least, most = flops.training_per_token, flops.training([64]) / 64
    for line in (line for line in history if "loss" in line):
        assert least <= line["mfu"] * 1e12 / line["tokens_per_second"] <= most
        assert all(line[key] > 0 for key in ("tokens_per_second", "mfu", "memory_gb", "learning_rate", "grad_norm"))
        assert line["eta_minutes"] >= 0
        assert line["epoch"] in (0, 1)  # complete passes over the documents
    assert sum("eval_loss" in line for line in history) == 2
    assert list((tmp_path / "logged" / "runs").rglob("events.out.*"))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--torch_compile", "--gradient_checkpointing", "--bf16"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")
def test_ways_to_run(train, curve, whole, option: str):
    if option == "--torch_compile":
        assert train("other", option, "--max_steps", "3", "--torch_compile_backend", "aot_eager") == 0
    else:
        assert train("other", option, "--max_steps", "3") == 0
    assert curve("other")[0][1] == pytest.approx(curve("whole")[0][1], rel=2e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_lora_improves_on_another_text_and_merges(whole, tmp_path, capsys):
    text = tmp_path / "second.txt"
    text.write_text("abc" * 2000)
    config = tmp_path / "lora.yaml"
    config.write_text(f"model: {whole}\nlora: {{r: 4}}\ndata: {text}\nlength: 64\nmax_steps: 20\nreport_to: none\n")
    options = ["--learning_rate", "3e-2", "--per_device_train_batch_size", "4", "--logging_steps", "5"]
    assert main([str(config), "--output_dir", str(tmp_path / "tuned"), *options, "--save_steps", "10"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    tokens = tokenizer("abc" * 20, return_tensors="pt")["input_ids"]

    def loss(model) -> float:
        return model(tokens, labels=tokens).loss.item()

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    base = AutoModelForCausalLM.from_pretrained(whole)
    assert loss(merged) < 0.9 * loss(base)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, tmp_path / "tuned" / "adapter").eval()
    assert loss(adapted) == pytest.approx(loss(merged), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--column", "body"), "column: expected one of ['text']"),
        (("--data", "no/such/data"), "no/such/data"),
        (("--tokenizer", "no/such/tokenizer"), "no/such/tokenizer"),
        (("--config", '{"vocab_size": 100}'), "vocab_size 100 tokens, got 258"),
        (("--config", '{"mixer": []}'), "['mixer']"),
        (("--config", "{"), "config: expected JSON"),
        (("--config", '{"vocab_size": "258"}'), "'vocab_size' expected int"),
        (("--freeze", "*"), "freeze: expected patterns that leave a parameter to train"),
        (("--rows_per_step", "0"), "rows_per_step: expected a positive number, got 0"),
        (("--per_device_train_batch_size", "0"), "per_device_train_batch_size: expected a positive number, got 0"),
        (("--preset", "gla_7t"), "gla_7t"),
        (("--model", "elsewhere"), "both"),
        (("--lora", "{}"), "lora: expected a saved model"),
        (("--freeze", "head.*"), "head.*"),
        (("--max_steps", "many"), "many"),
        (("--max_steps", "0"), "max_steps"),
        (("--rows_per_step", "3"), "rows_per_step: expected a multiple of 2"),
        (("--length", "0"), "length"),
        (("--steps", "3"), "--steps"),
    ],
)
def test_bad_input_is_one_line_and_code_2(train, capsys, options: tuple[str, ...], named: str):
    assert train("bad", *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("hybridattn: ")
    assert err.count("\n") == 1
    assert named in err
