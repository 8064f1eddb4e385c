from pathlib import Path

import pytest
import torch

import hybridattn
from hybridattn import HybridAttnConfig, cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """run(*args) -> (exit code, stdout, stderr) of the hybridattn command."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(list(args))
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_version(run) -> None:
    assert run("--version") == (0, hybridattn.__version__ + "\n", "")


def test_help_names_every_verb(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(
        verb in out
        for verb in ("demo", "eval", "throughput", "pareto", "report", "train", "info", "convert", "linearize", "env")
    )


def test_env(run) -> None:
    code, out, _ = run("env")
    facts = {line[:13].strip(): line[13:] for line in out.splitlines()}
    assert code == 0
    assert facts["hybridattn"] == hybridattn.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == "1"
    assert all(facts.values())


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((), "command"),
        (("dance",), "dance"),
        (("demo", "--stesp", "2"), "--stesp"),
        (("demo", "--steps", "many"), "--steps"),
        (("demo", "--only", "nothing"), "nothing"),
        (("eval",), "--model"),
        (("eval", "--model", "x", "--lengths", "1k"), "lengths"),
        (("throughput",), "--model"),
        (("throughput", "--model", "no-such/", "--lengths", "1k"), "lengths"),
        (("throughput", "--model", "gla_340m", "--contexts", ""), "contexts"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--graphs"), "graphs"),
        (("pareto", "--shard", "3/2"), "shard"),
        (("report", "a", "b", "c"), "--merge"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--lengths", "0"), "lengths"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--lengths", ""), "lengths"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--contexts", "1,0"), "contexts"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--batches", "0"), "batches"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--budget", "-1"), "budget"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--budget", "inf"), "budget"),
        (("throughput", "--model", "gla_340m", "--device", "cpu", "--budget", "nan"), "budget"),
        (("pareto", "--suite", "no-such-suite"), "no-such-suite"),
        (("pareto", "--shard", "1"), "shard"),
        (("pareto", "--rounds", "0"), "--rounds"),
        (("report", "no-such-folder"), "no-such-folder"),
        (("train",), "CONFIG"),
        (("train", "no-such-config"), "no-such-config"),
        (("train", "tiny_cpu", "--max_step", "3"), "--max_step"),
        (("linearize", "no-such-model"), "'out'"),
        (("linearize", "no-such-model", "out"), "--pattern"),
        (("info",), "MODEL_OR_PRESET"),
        (("info", "no-such-preset"), "no-such-preset"),
        (("info", "gla_340m", "--dtype", "int3"), "int3"),
        (("kernels", "compile", "--arch", "sm_70"), "sm_70"),
        (("kernels", "compile", "--kernel", "dance"), "dance"),
        (("kernels", "check", "--kernel", "dance"), "dance"),
        (("kernels", "check", "--backend", "cuda"), "cuda"),
        (("kernels", "check", "--device", "cpu", "--backend", "triton"), "TRITON_INTERPRET"),
        (("kernels", "check", "--device", "cpu", "--record"), "record"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, args: tuple[str, ...], named: str) -> None:
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert err.startswith("hybridattn: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.slow
def test_eval_says_what_to_install(run_python) -> None:
    code = """
from hybridattn.cli import main
try:
    main(["eval", "--model", "x"])
except SystemExit as exit:
    print(exit)
"""
    assert run_python(code, blocked=("lm_eval",)) == "2\n"


def test_kernels_compile_fails_over_a_ceiling(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridattn.workshop import compile

    for clean, expected in ((True, 0), (False, 1)):
        monkeypatch.setattr(compile, "check_compilation", lambda *args, clean=clean, **options: clean)
        assert run("kernels", "compile")[0] == expected


def test_info_refuses_a_foreign_model(run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = run("info", str(tmp_path))
    assert code == 2
    assert "'llama'" in err


@pytest.mark.slow
def test_info_on_every_preset(run) -> None:
    from hybridattn.models.presets import PRESETS

    for preset in PRESETS:
        code, out, _ = run("info", preset)
        assert code == 0
        assert preset in out


def test_info_on_a_saved_model(run, tmp_path: Path) -> None:
    options = {"linear": {"num_heads": 2}, "full": {"num_heads": 2}}
    config = hybridattn.HybridAttnConfig(
        vocab_size=32, hidden_size=16, mixers=["linear", "full"], mixer_options=options, mlp="none"
    )
    config.save_pretrained(tmp_path)
    code, out, _ = run("info", str(tmp_path), "--dtype", "float32")
    assert code == 0
    rows = {cells[0]: cells[1:] for line in out.splitlines() if (cells := line.split())}
    _, _, linear_at_2k, _, linear_at_1m = rows["0"]
    _, _, full_at_2k, _, full_at_1m = rows["1"]
    assert linear_at_2k == linear_at_1m
    assert full_at_2k == f"{2 * 2**11 * 16:,}"  # keys and values
    assert full_at_1m == f"{2 * 2**20 * 16:,}"
    assert rows["model"][0] == f"{hybridattn.HybridAttnForCausalLM(config).num_parameters():,}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["bench", "check"])
def test_a_missing_gpu_is_named(run, verb: str, tmp_path: Path) -> None:
    code, _, err = run("kernels", verb, "--device", "cuda", "--out", str(tmp_path / "out.jsonl"))
    assert (code, err) == (2, "hybridattn: device: expected 'cpu' without a GPU, got 'cuda'\n")


@pytest.mark.slow
def test_throughput_of_any_model_is_a_report_that_can_be_compared_and_merged(run, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaConfig(vocab_size=64, **sizes).save_pretrained(
        tmp_path / "llama"
    )  # without weights, so that random ones are used
    HybridAttnConfig(vocab_size=64, hidden_size=16, mixers=["gla"]).save_pretrained(tmp_path / "gla")
    few = ("--lengths", "32,64", "--contexts", "16,32", "--batches", "1,2", "--rounds", "1", "--device", "cpu")
    for name in ("llama", "gla"):
        out = str(tmp_path / f"of {name}")
        code, printed, _ = run("throughput", "--model", str(tmp_path / name), *few, "--training", "16", "--out", out)
        assert code == 0
        assert "1 configuration, " in printed
        assert "report.html" in printed
        text = (tmp_path / f"of {name}" / "report.md").read_text()
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in text) == (name == "llama")
    folders = [str(tmp_path / f"of {name}") for name in ("llama", "gla")]
    code, printed, _ = run("report", *folders)
    assert code == 0
    assert "0 figures in both reports" in printed
    code, printed, _ = run("report", *folders, "--merge", str(tmp_path / "both"))
    assert code == 0
    assert "2 configurations, " in printed
    code, printed, _ = run("report", folders[0], str(tmp_path / "both"))
    assert "the ranges of 0 do not overlap" in printed
    assert f"Only in {tmp_path / 'both'}: {tmp_path / 'gla'}." in printed


def test_a_cache_that_differs_from_its_formula_fails_the_command(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridattn.evals.speed import memory

    honest = memory.bytes_of
    monkeypatch.setattr(memory, "bytes_of", lambda cache: honest(cache) + 4)
    HybridAttnConfig(vocab_size=64, hidden_size=16, mixers=["gla"]).save_pretrained(tmp_path / "gla")
    few = ("--lengths", "32", "--contexts", "16", "--batches", "1", "--rounds", "1", "--device", "cpu")
    code, _, told = run("throughput", "--model", str(tmp_path / "gla"), *few, "--out", str(tmp_path / "out"))
    assert code == 1
    assert "cache after 16 tokens: expected" in told
    assert "differ from their declaration" in (tmp_path / "out" / "report.md").read_text()
