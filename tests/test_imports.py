"""What may be imported without what, each in a fresh process."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import hybridattn

ROOT = Path(__file__).parents[1]
EXTRAS = ("accelerate", "datasets", "lm_eval", "matplotlib", "peft", "tensorboard")


def modules_of(wing: str) -> list[str]:
    files = [p.relative_to(ROOT) for p in (ROOT / "hybridattn" / wing).rglob("*.py")]
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in files]
    return sorted(name for name in names if ".triton" not in name)


LM_EVAL = ("hybridattn.evals.lm_eval.harness", "hybridattn.evals.lm_eval.run")  # lm-eval's model and its command


def test_importing_the_package_loads_nothing_heavy(run_python: Callable[..., str]) -> None:
    loaded = run_python("import hybridattn, hybridattn.cli, sys; print(*sys.modules)").split()
    assert not {"torch", "triton", "transformers", "numpy"} & set(loaded)


def test_an_operator_runs_without_transformers_and_triton(run_python: Callable[..., str]) -> None:
    code = """
import hybridattn, torch
q, k, v = torch.randn(3, 1, 5, 2, 4)
o, state = hybridattn.gated_linear_attention(q, k, v, -torch.rand(1, 5, 2, 4), output_final_state=True)
assert o.shape == (1, 5, 2, 4) and state.shape == (1, 2, 4, 4)
"""
    run_python(code, blocked=("transformers", "triton"))


@pytest.mark.parametrize(
    ("wing", "blocked"),
    [
        ("kernels", ("transformers", "triton", "einops", *EXTRAS)),
        ("layers", ("transformers", "triton", *EXTRAS)),
        ("models", ("triton", *EXTRAS)),
        ("training", ("triton", *EXTRAS)),
        ("evals", ("triton", *(extra for extra in EXTRAS if extra != "matplotlib"))),  # it draws
    ],
)
def test_a_wing_imports_without_heavier_packages(
    wing: str, blocked: tuple[str, ...], run_python: Callable[..., str]
) -> None:
    modules = [module for module in modules_of(wing) if module not in LM_EVAL]
    assert modules
    run_python("".join(f"import {module}\n" for module in modules), blocked=blocked)


def test_public_names_are_listed_once_and_lead_somewhere() -> None:
    (block,) = (
        node for node in ast.parse((ROOT / "hybridattn" / "__init__.py").read_text()).body if isinstance(node, ast.If)
    )
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == hybridattn._MODULES
    assert hybridattn.__all__ == [*hybridattn._MODULES, "__version__"]
    assert set(hybridattn.__all__) <= set(dir(hybridattn))
    for name in hybridattn.__all__:
        assert getattr(hybridattn, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        hybridattn.softmax  # noqa: B018


def test_transformers_imports_at_the_repository_root(run_python: Callable[..., str]) -> None:
    run_python("import transformers; transformers.LlamaForCausalLM")


def test_an_installed_kernels_package_wins_over_the_root_link(run_python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("installed = True")
    run_python("import kernels; assert kernels.installed", path=tmp_path)
