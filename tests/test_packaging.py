"""The repository's layout and what the built distributions contain."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hybridattn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybridattn"
SUBPACKAGES = ("kernels", "layers", "models", "training", "evals")  # each may import those before it
MAY_IMPORT = {subpackage: {*SUBPACKAGES[: n + 1]} for n, subpackage in enumerate(SUBPACKAGES)} | {
    "measure": {"measure"},
    "workshop": {"workshop", "kernels", "measure"},
}
MAY_IMPORT["evals"].add("measure")
PUBLIC = {  # the public names, with the modules that the stub imports them from
    alias.name: f"hybridattn.{node.module}"
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
APART = [("report", "speed"), ("speed", "report")]  # subpackages of evals that do not import each other


def package_files() -> list[str]:
    files = (p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return sorted(p.relative_to(ROOT).as_posix() for p in files)


@pytest.mark.parametrize("subpackage", ["kernels", "models", "evals"])
def test_root_links_lead_to_namespace_packages(subpackage: str) -> None:
    link = ROOT / subpackage
    assert link.is_symlink()
    assert link.readlink() == Path("hybridattn", subpackage)
    # A regular package called kernels in the working directory would shadow Hugging Face's and break transformers.
    assert not (link / "__init__.py").exists()


def imported_modules(file: Path) -> set[str]:
    """Return the modules that `file` imports anywhere; a public name counts as the module that defines it."""
    package = file.relative_to(ROOT).parent.parts
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            origin = ".".join([*above, *filter(None, [node.module])])
            if origin == "hybridattn":
                modules |= {PUBLIC.get(alias.name, f"hybridattn.{alias.name}") for alias in node.names}
            else:
                modules.add(origin)
    return modules


def imports_within(folder: Path) -> dict[str, str]:
    """Return the modules of hybridattn that files of a folder import, each with one such file."""
    found = ((module, file) for file in folder.rglob("*.py") for module in imported_modules(file))
    return {module: str(file.relative_to(ROOT)) for module, file in found if module.startswith("hybridattn.")}


@pytest.mark.parametrize("subpackage", MAY_IMPORT)
def test_imports_run_one_way(subpackage: str) -> None:
    found = imports_within(PACKAGE / subpackage)
    assert found or subpackage == "measure"
    assert not {module: file for module, file in found.items() if module.split(".")[1] not in MAY_IMPORT[subpackage]}


@pytest.mark.parametrize(("part", "other"), APART)
def test_independent_subpackages_of_evals(part: str, other: str) -> None:
    found = imports_within(PACKAGE / "evals" / part)
    assert found
    name = f"hybridattn.evals.{other}"
    assert not {module: file for module, file in found.items() if f"{module}.".startswith(f"{name}.")}


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hybridattn.__version__


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.mark.slow
def test_wheel_contains_every_file_of_the_package_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert "hybridattn/py.typed" in names
    assert sorted(names) == package_files()


@pytest.mark.slow
def test_sdist_contains_every_file_of_the_package(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {*package_files(), "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"}
