"""Imports of the package without optional or slow dependencies, each in a new process."""

from collections.abc import Callable
from pathlib import Path

import pytest

import hybridattn

ROOT = Path(__file__).parents[1]
EXTRAS = ("accelerate", "datasets", "lm_eval", "matplotlib", "peft", "tensorboard")
# Modules that are slow to import, and that neither an operator nor `hybridattn info` needs.
SLOW = (
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "triton"),
    *("transformers.modeling_utils", "transformers.generation.utils", "scipy", "sklearn", "pandas", *EXTRAS),
)


def modules_of(subpackage: str) -> list[str]:
    files = [p.relative_to(ROOT) for p in (ROOT / "hybridattn" / subpackage).rglob("*.py")]
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in files]
    return sorted(name for name in names if ".triton" not in name)


LM_EVAL = ("hybridattn.evals.lm_eval.harness", "hybridattn.evals.lm_eval.evaluate")  # lm-eval's model and its command


def test_importing_the_package_loads_nothing_heavy(run_python: Callable[..., str]) -> None:
    loaded = run_python("import hybridattn, hybridattn.cli, sys; print(*sys.modules)").split()
    assert not {"torch", "triton", "transformers", "numpy"} & set(loaded)


def test_an_operator_runs_without_transformers_and_triton(run_python: Callable[..., str]) -> None:
    """Forward, backward and a step import no slow module."""
    code = """
import hybridattn, torch
q, k, v = torch.randn(3, 1, 5, 2, 4).requires_grad_().unbind()
g = -torch.rand(1, 5, 2, 4)
o, state = hybridattn.gated_linear_attention(q, k, v, g, output_final_state=True)
assert o.shape == (1, 5, 2, 4) and state.shape == (1, 2, 4, 4)
(o + hybridattn.flash_attention(q, k, v)).sum().backward()
with torch.no_grad():
    hybridattn.gated_linear_attention_step(*(x[:, :1] for x in (q, k, v, g)), state.detach())
print(*(name for name in sys.modules if sys.modules[name]))
"""
    loaded = run_python(code, blocked=("transformers", "triton")).split()
    assert not {*SLOW, "transformers", "einops"} & set(loaded)


def test_info_on_a_preset_imports_no_slow_module(run_python: Callable[..., str]) -> None:
    """AutoModel finds the classes later. It runs in the repository root, where the link ``kernels`` must not shadow."""
    code = """
from hybridattn.cli import main
try:
    main(["info", "gla_340m"])
except SystemExit as exit:
    assert not exit.code
print(*sys.modules)
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from hybridattn.models.presets import PRESETS
small = PRESETS["gla_340m"](hidden_size=8, num_hidden_layers=1, intermediate_size=8, vocab_size=8)
print(type(AutoModelForCausalLM.from_config(small)).__name__)
"""
    *_, loaded, model = run_python(code).splitlines()
    assert not set(SLOW) & set(loaded.split())
    assert model == "HybridAttnGLAForCausalLM"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subpackage", "blocked"),
    [
        ("kernels measure", ("transformers", "triton", "einops", *EXTRAS)),
        ("layers", ("transformers", "triton", *EXTRAS)),
        ("models", ("triton", *EXTRAS)),
        ("training", ("triton", *EXTRAS)),
        ("evals", ("triton", *(extra for extra in EXTRAS if extra != "matplotlib"))),  # evals draws plots
    ],
)
def test_a_subpackage_imports_without_optional_dependencies(
    subpackage: str, blocked: tuple[str, ...], run_python: Callable[..., str]
) -> None:
    modules = [module for part in subpackage.split() for module in modules_of(part) if module not in LM_EVAL]
    assert modules
    run_python("".join(f"import {module}\n" for module in modules), blocked=blocked)


def test_public_names_can_be_imported(run_python: Callable[..., str]) -> None:
    assert {"Cache", "TokenMixer", "NormalizedState", "PRESETS", "BlockMask"} <= set(hybridattn.__all__)
    assert set(hybridattn.__all__) <= set(dir(hybridattn))
    run_python(
        "from hybridattn import *; from hybridattn.models.decoder import *; from hybridattn.models.families import *"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attribute softmax"):
        hybridattn.softmax  # noqa: B018


def test_an_installed_kernels_package_wins_over_the_root_link(run_python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("installed = True")
    run_python("import kernels; assert kernels.installed", path=tmp_path)
