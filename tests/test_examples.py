"""Every program of examples/ runs; those with cells run as notebooks."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbclient
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("*.py"))}
NOTEBOOKS = {name for name, path in EXAMPLES.items() if "# %%\n" in path.read_text(encoding="utf-8")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_listed(name: str):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert f"`python examples/{name}" in (ast.get_docstring(ast.parse(text)) or "")
    assert f"]({name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - NOTEBOOKS))
def test_program_runs(name: str, tmp_path: Path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, EXAMPLES[name]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the kernel's process
    notebook = jupytext.read(EXAMPLES[name])
    assert {cell.cell_type for cell in notebook.cells} == {"code", "markdown"}
    nbclient.execute(notebook, cwd=str(tmp_path), kernel_name="python3")
