"""`hybridattn eval` on a tiny checkpoint, compared with lm-eval's own command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks._index import TaskIndex
from transformers import MambaConfig

from hybridattn import HybridAttnConfig, HybridAttnForCausalLM, cli
from hybridattn.evals.lm_eval import harness
from hybridattn.evals.lm_eval.tasks import TASKS, filler
from hybridattn.training.byte_corpus import PAD, SEPARATOR, VOCAB_SIZE, byte_tokenizer

SIZES = '{"max_seq_lengths": [300, 400], "loads": [2, 4], "depths": [0, 1], "rows_per_cell": 1}'
FLAGS = ("--tasks", "hybridattn_kv", "hybridattn_niah_single_twice", "--metadata", SIZES, "--device", "cpu")
ROWS = 8 + 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = HybridAttnConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        mixers=["gla", "window", "full"],
        mixer_options={"gla": {"num_heads": 2}, "window": {"num_heads": 2, "window": 16}, "full": {"num_heads": 2}},
        initializer="fan_in",
        tie_word_embeddings=False,  # otherwise it repeats the last byte
        max_position_embeddings=448,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
        pad_token_id=PAD,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    HybridAttnForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """run(out, *flags, model=checkpoint) -> exit code of `hybridattn eval` with only this package's tasks."""
    build = TaskIndex.build
    ours = staticmethod(lambda paths, **options: build([path for path in paths if Path(path) == TASKS], **options))
    monkeypatch.setattr(TaskIndex, "build", ours)

    def run(out: Path, *flags: str, model: str = checkpoint) -> int:
        with pytest.raises(SystemExit) as exit:
            cli.main(["eval", "--model", model, "--output_path", str(out), *flags])
        return exit.value.code or 0

    return run


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def answers(folder: Path) -> dict[tuple[str, int], tuple[str, float]]:
    """Return the model's answer and its score by (task, row), from lm-eval's files."""
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            found[path.name.rpartition("_")[0], sample["doc_id"]] = (sample["resps"][0][0], sample["contains"])
    return found


def metrics(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


@pytest.mark.slow
def test_the_same_numbers_as_lm_eval_and_with_any_batch(run: Callable[..., int], checkpoint: str, tmp_path: Path):
    ours = tmp_path / "ours"
    assert run(ours, *FLAGS, "--batch_size", "1") == 0
    said = answers(ours)
    assert len(said) == ROWS
    assert len({text for text, _ in said.values()}) > ROWS / 2  # answers are not empty and differ

    assert run(tmp_path / "eight", *FLAGS, "--batch_size", "8") == 0
    assert answers(tmp_path / "eight") == said

    arguments = f"pretrained={checkpoint},trust_remote_code=True,max_length=448"
    command = [sys.executable, "-m", "lm_eval", "run", "--include_path", str(TASKS), "--model", "hf"]
    command += ["--model_args", arguments, *FLAGS, "--log_samples", "--output_path", str(tmp_path / "theirs")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "theirs") == said
    assert metrics(tmp_path / "theirs") == metrics(ours)


def test_the_report(run: Callable[..., int], checkpoint: str, tmp_path: Path):
    out = tmp_path / "out"
    assert run(out, *FLAGS, "--batch_size", "8", "--limit", "6", "--trained_length", "70") == 0
    results = read(out)
    assert list(results["positions"]["lengths"]) == ["70", "140", "280", "560", "1120"]
    assert results["positions"]["bytes_per_token"] == 1
    bits = [span["bits"] for span in results["positions"]["lengths"]["70"]]
    assert len(bits) == 3
    assert all(5 < x < 12 for x in bits)  # untrained: about 8
    assert results["tasks"].keys() == {"hybridattn_kv", "hybridattn_niah_single_twice"}
    assert results["tasks"]["hybridattn_kv"]["rows"] == 6
    assert {cell["length"] for cell in results["tasks"]["hybridattn_kv"]["cells"]} == {300, 400}
    assert {result["tolerance"] for result in results["parity"].values()} == {1e-4}
    assert results["truncated"] == 0
    assert results["device"] == "cpu"
    config = results["provenance"]["config"]
    assert config["model_args"] == {"pretrained": checkpoint, "allow_truncation": False, "max_length": 448}
    assert config["filler_sha256"] == filler.sha256()
    report = (out / "report.md").read_text()
    assert "## By length" in report
    assert "from 64" in report
    assert "trained on sequences of 70 tokens" in report
    assert "| hybridattn_kv " in report
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "report.md",
        "lm_eval",
        "hybridattn_kv.png",
        "hybridattn_niah_single_twice.png",
    }
    assert list(tmp_path.iterdir()) == [out]  # the cached answers are deleted


@pytest.mark.slow
def test_an_interrupted_run_resumes(run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, generate = tmp_path / "out", harness.CheckedLM._model_generate
    asked: list[int] = []

    def interrupted(self: Any, context: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(context))
        return generate(self, context, **options)

    def counted(self: Any, context: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append(len(context))
        return generate(self, context, **options)

    flags = (*FLAGS, "--batch_size", "3")
    monkeypatch.setattr(harness.CheckedLM, "_model_generate", interrupted)
    assert run(out, *flags) == 130
    assert not out.exists()
    assert sum(asked) == 6

    monkeypatch.setattr(harness.CheckedLM, "_model_generate", counted)
    assert run(out, *flags) == 0
    assert sum(asked) == ROWS
    assert run(tmp_path / "whole", *flags) == 0
    assert sum(asked) == 2 * ROWS
    assert answers(out) == answers(tmp_path / "whole")


@pytest.mark.slow
def test_truncated_prompts_fail_the_run(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    flags = (*FLAGS, "--model_args", "max_length=380")
    assert run(out, *flags) == 1
    assert (
        "expected at most max_length=380 tokens with the tokens to generate, got more in 6 of 12"
        in capsys.readouterr().err
    )
    assert not out.exists()
    assert run(out, *flags, "--allow_truncation") == 0
    assert read(out)["truncated"] == 6
    assert "Truncated prompts: 6." in (out / "report.md").read_text()


def test_nothing_is_scored_when_a_gate_fails(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    forward = HybridAttnForCausalLM.forward

    def ignores_padding(self: Any, input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        rest.pop("position_ids", None)
        return forward(self, input_ids, **rest)

    monkeypatch.setattr(HybridAttnForCausalLM, "forward", ignores_padding)
    monkeypatch.setattr(harness.CheckedLM, "generate_until", lambda *args, **options: pytest.fail("scored"))
    assert run(tmp_path / "out", *FLAGS) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "hybridattn: parity: expected all gates to pass before scoring, got failed: padded = unpadded (error "
    )
    assert "cached" not in error
    assert not (tmp_path / "out").exists()


def test_bad_input_is_named(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for flags, named in (
        ((), "tasks: expected"),
        (("--tasks", "no_such_task"), "no_such_task"),
        (("--tasks", "hybridattn_kv", "--lengths", "1k"), "lengths: expected positive integers"),
        (("--tasks", "hybridattn_kv", "--trained_length", "0"), "trained_length: expected a positive number"),
        (("--tasks", "hybridattn_kv", "--lengths", "60"), "max_seq_lengths: expected"),
    ):
        assert run(tmp_path / "out", *flags) == 2
        assert named in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert run(tmp_path / "out", *FLAGS) == 2
    assert "out: expected" in capsys.readouterr().err


def test_a_model_without_a_maximum_length_needs_lengths(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    MambaConfig(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert run(tmp_path / "out", "--tasks", "hybridattn_kv", model=str(tmp_path)) == 2
    assert "lengths: expected --lengths, or max_length" in capsys.readouterr().err
