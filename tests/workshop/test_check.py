"""The check passes for all CPU backends, fails for wrong results, and continues an interrupted run."""

import json
from pathlib import Path

import pytest
import torch

from hybridattn import cli
from hybridattn.kernels.flash_attention.triton.launch import (
    DECODE_ROWS,
    FORWARD,
    KERNELS,
    attention_launch,
    decode_launch,
)
from hybridattn.kernels.linear_attention.triton.launch import STEP, VALUES, chunk_launch, step_launch
from hybridattn.kernels.runtime.architectures import SHARED_MEMORY
from hybridattn.workshop import check, records
from hybridattn.workshop.cases import DTYPES, OPERATORS, make_inputs, sizes_of

CPU = torch.device("cpu")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_every_operator_of_the_cpu_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main(["kernels", "check", "--device", "cpu", "--out", str(tmp_path / "new" / "check.jsonl")])
    assert not exit.value.code, capsys.readouterr().out
    done = lines(tmp_path / "new" / "check.jsonl")
    assert {line["case"].partition(",")[0] for line in done} == set(OPERATORS)
    assert all(line["passed"] and line["error"] <= line["limit"] and line["same_bits"] for line in done)
    assert len({line["case"] for line in done}) == len(done)


def test_recorded_cases_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, ran = tmp_path / "check.jsonl", []
    monkeypatch.setattr(check, "run_case", lambda case, device: ran.append(case.name) or {"passed": True})
    assert check.check_operators("cpu", out, ["flash_attention"])
    first = list(ran)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-2]))  # as after an interruption
    assert check.check_operators("cpu", out, ["flash_attention"])
    assert ran == first + first[-2:]
    monkeypatch.setattr(records, "source_sha256", lambda: "other code")
    assert check.check_operators("cpu", out, ["flash_attention"])
    assert len(ran) == 2 * len(first) + 2


def test_a_failure_is_reported_and_other_cases_run(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    name = "linear_attention_step"
    right = OPERATORS[name]

    def raises_at_four_tokens(x, backend):
        if x["q"].shape[1] == 4:
            raise RuntimeError("out of shared memory")
        return right.call(x, backend)

    monkeypatch.setitem(OPERATORS, name, right._replace(call=raises_at_four_tokens))
    assert not check.check_operators("cpu", tmp_path / "check.jsonl", [name])
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 3  # one per dtype
    assert "RuntimeError: out of shared memory" in printed
    assert sum(line["passed"] for line in lines(tmp_path / "check.jsonl")) == len(check.cases(CPU, [name])) - 3


def wrong_by_a_percent(results):
    results["o"] *= 1.01
    return results


def unwritten(results):
    return {**results, "o": torch.empty_like(results["o"])}


def other_bits(results):
    results["o"] *= 1 + 1e-6 * torch.rand(())
    return results


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(wrong_by_a_percent, "of o, limit"), (unwritten, "error nan of o"), (other_bits, "gave other bits")],
)
def test_faults_of_a_backend_are_reported(spoil, message: str, tmp_path: Path, monkeypatch, capsys):
    name = "linear_attention_step"
    right = OPERATORS[name]
    assert check.check_operators("cpu", tmp_path / "right.jsonl", [name])
    assert "FAILED" not in capsys.readouterr().out

    def wrong(x, backend):
        results = right.call(x, backend)
        return results if backend == "reference" else spoil(results)

    monkeypatch.setitem(OPERATORS, name, right._replace(call=wrong))
    assert not check.check_operators("cpu", tmp_path / "wrong.jsonl", [name])
    assert message in capsys.readouterr().out


def test_the_check_fills_uninitialised_memory_with_nan():
    """tests/conftest.py does so for all tests; the check has to do it by itself."""
    torch.use_deterministic_algorithms(False)
    try:
        with check.poisoned():
            assert torch.empty(1000).isnan().all()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)


def test_the_limits_are_those_of_the_first_law():
    assert (check.EXACT, check.EXACT_GRADIENT) == (1e-5, 1e-4)
    assert (check.ROUNDING, check.ROUNDING_GRADIENT) == (1.5, 2.0)


def test_gradients_are_checked():
    """Of every input of every operator that has a backward pass."""
    for name, operator in OPERATORS.items():
        case = next(case for case in check.cases(CPU, [name.partition(" ")[0]]) if case.operator == name)
        inputs = make_inputs(operator, case.sizes, CPU, 0)
        found = check.evaluate(case, inputs, case.backend, torch.float32)
        assert {f"d{x}" for x in inputs} <= set(found) or not operator.backward


def test_every_launch_row_has_cases():
    for architecture in SHARED_MEMORY:
        rows = {
            row
            for name, operator in OPERATORS.items()
            for sizes in sizes_of(name, on_gpu=True)
            for dtype in DTYPES
            for row in (operator.rows(architecture, sizes, dtype) if operator.rows else [])
        }
        assert rows >= {step_launch(architecture, key_dim).name for key_dim in STEP[architecture]}
        assert rows >= {
            chunk_launch(kernel, architecture, dim, dim, operands).name
            for kernel in ("sweep_values", "sweep_keys", "states")
            for operands, dims in VALUES[architecture].items()
            for dim in dims
        }
        for dim in FORWARD[architecture]:
            for bits in (16, 32):
                assert rows >= {attention_launch(name, architecture, dim, dim, bits).name for name in KERNELS}
                assert rows >= {decode_launch(architecture, n, dim, dim, bits).name for n in DECODE_ROWS}


def test_realistic_sizes_on_a_gpu():
    for name, operator in OPERATORS.items():
        sizes = list(sizes_of(name, on_gpu=True))
        tokens = max(each.tokens for each in sizes)
        assert tokens >= (1 << 16 if operator.long and operator.family == "linear_attention" else 4)
        assert {"q", "k", "v"} <= {each.far for each in sizes}
        assert any(each.query_group > 1 for each in sizes)


def test_rows_more_than_32_bits_apart(monkeypatch: pytest.MonkeyPatch):
    assert check.FAR > 1 << 31
    monkeypatch.setattr(check, "FAR", 1000)
    x = torch.randn(3, 4, 5).mT
    apart = check.far_apart(x)
    assert torch.equal(apart, x)
    assert apart.stride(0) == 1000


def test_rows_that_are_far_apart_reach_the_backend_as_such(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check, "FAR", 100_000)
    name, strides = "linear_attention_step", {}
    right = OPERATORS[name]

    def noted(x, backend):
        strides[backend] = {which: value.stride(0) for which, value in x.items()}
        return right.call(x, backend)

    monkeypatch.setitem(OPERATORS, name, right._replace(call=noted))
    (sizes,) = (sizes for sizes in sizes_of(name, on_gpu=True) if sizes.far == "k")
    assert check.run_case(check.Case(name, "torch", torch.float32, sizes), CPU)["passed"]
    assert [which for which, stride in strides["torch"].items() if stride == check.FAR] == ["k"]
    assert check.FAR not in strides["reference"].values()


def test_gates_are_signed_down_to_minus_60_and_exact_in_16_bits():
    name = "gated_linear_attention per-channel"
    for sizes in list(sizes_of(name, on_gpu=False))[::2]:
        x = make_inputs(OPERATORS[name], sizes, CPU, 0)
        assert x["g"].max() <= 0
        assert x["g"].min() < -50
        assert all(torch.equal(x["g"].to(dtype).double(), x["g"]) for dtype in (torch.bfloat16, torch.float16))
        assert x["q"].min() < 0 < x["q"].max()


def test_rows_are_verified_where_all_their_cases_passed(tmp_path: Path):
    folder = tmp_path / "linear_attention" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "flash_attention" / "triton").mkdir(parents=True)
    (tmp_path / "flash_attention" / "triton" / "verified.json").write_text("{}")
    source = {"architecture": "sm_90", "device": "H"}
    gpu = torch.device("cuda")
    everything = {case.name for case in check.cases(gpu, backends=["triton"])}
    k16 = step_launch("sm_90", 16).name
    failed = next(
        case.name
        for case in check.cases(gpu, backends=["triton"])
        if "step" in case.operator and k16 == step_launch("sm_90", case.sizes.key_dim).name
    )
    (folder / "verified.json").write_text(json.dumps({"sm_80": {"row": {}}, "sm_90": {"gone": {}}}))
    check.verify(source, everything - {failed}, gpu, tmp_path)
    verified = json.loads((folder / "verified.json").read_text())
    assert verified["sm_80"] == {"row": {}}
    steps = {step_launch("sm_90", k).name for k in STEP["sm_90"]}
    assert steps & set(verified["sm_90"]) == steps - {k16}
    assert verified["sm_90"][step_launch("sm_90", 32).name] == source
