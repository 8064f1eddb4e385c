"""What may be imported without what, each in a fresh process."""

from collections.abc import Callable
from pathlib import Path

import pytest

import hybridattn

ROOT = Path(__file__).parents[1]
EXTRAS = ("accelerate", "datasets", "lm_eval", "matplotlib", "peft", "tensorboard")
# Modules that take long to import, and are needed neither for an operator nor to describe a model.
SLOW = (
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "triton"),
    *("transformers.modeling_utils", "transformers.generation.utils", "scipy", "sklearn", "pandas", *EXTRAS),
)


def modules_of(wing: str) -> list[str]:
    files = [p.relative_to(ROOT) for p in (ROOT / "hybridattn" / wing).rglob("*.py")]
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in files]
    return sorted(name for name in names if ".triton" not in name)


LM_EVAL = ("hybridattn.evals.lm_eval.harness", "hybridattn.evals.lm_eval.evaluate")  # lm-eval's model and its command


def test_importing_the_package_loads_nothing_heavy(run_python: Callable[..., str]) -> None:
    loaded = run_python("import hybridattn, hybridattn.cli, sys; print(*sys.modules)").split()
    assert not {"torch", "triton", "transformers", "numpy"} & set(loaded)


def test_an_operator_runs_without_transformers_and_triton(run_python: Callable[..., str]) -> None:
    """Forward, backward and a step; and nothing slow is imported on the way."""
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


def test_a_preset_is_described_without_anything_slow(run_python: Callable[..., str]) -> None:
    """And AutoModel knows it later; transformers imports at the repository root, where there is a link ``kernels``."""
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
    ("wing", "blocked"),
    [
        ("kernels measure", ("transformers", "triton", "einops", *EXTRAS)),
        ("layers", ("transformers", "triton", *EXTRAS)),
        ("models", ("triton", *EXTRAS)),
        ("training", ("triton", *EXTRAS)),
        ("evals", ("triton", *(extra for extra in EXTRAS if extra != "matplotlib"))),  # it draws
    ],
)
def test_a_wing_imports_without_heavier_packages(
    wing: str, blocked: tuple[str, ...], run_python: Callable[..., str]
) -> None:
    modules = [module for part in wing.split() for module in modules_of(part) if module not in LM_EVAL]
    assert modules
    run_python("".join(f"import {module}\n" for module in modules), blocked=blocked)


def test_public_names_lead_somewhere(run_python: Callable[..., str]) -> None:
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
